"""Compare models tuned on preferences, on the questions of ``preference_zh_tw_test.jsonl``.

One answer is drawn to each question from each model, at temperature 1. What is told of a model:

- the reward model's mean score of its answers;
- how often the reward model prefers its answer to the first model's, and how often the rule of
  ``preference.py`` does, both in percent, a tie counting half;
- how many answers the rule finds courteous, and how many are right;
- the divergence from the first model in nats an answer: the mean of log p(answer) − log p₀(answer)
  over the model's own answers, an unbiased estimate of KL(p ‖ p₀);
- the mean length in tokens, the end token among them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trainer.inference.chat_model import ChatModel

SEQUENCES_AT_ONCE = 32
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Answers:
    """One model's answers, in the order of the questions.

    Attributes:
        texts: what was said.
        sequences: token ids of prompt and answer, with the end token if the answer has one.
        prompt_lengths: tokens of each prompt.
        logps: log-probability of each answer under the model itself.
    """

    texts: list[str]
    sequences: list[list[int]]
    prompt_lengths: list[int]
    logps: list[float]

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each answer."""
        return [
            len(ids) - start for ids, start in zip(self.sequences, self.prompt_lengths, strict=True)
        ]


def draw_answers(model: ChatModel, questions: Sequence[str]) -> Answers:
    """Draw an answer to each question at temperature 1."""
    from trainer.data.chats.conversation import Message
    from trainer.inference.decoding import Decoding

    decoding = Decoding(max_new_tokens=MAX_NEW_TOKENS, temperature=1, top_p=1)
    prompts = [model.prompt_ids([Message("user", question)]) for question in questions]
    streams = [model.stream(prompt, decoding) for prompt in prompts]
    for start in range(0, len(prompts), SEQUENCES_AT_ONCE):
        part = slice(start, start + SEQUENCES_AT_ONCE)
        model.run(prompts[part], streams[part], decoding, questions[part])
    sequences = [[*p, *s.token_ids] for p, s in zip(prompts, streams, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    return Answers(
        texts=[" ".join(stream.text.split()) for stream in streams],
        sequences=sequences,
        prompt_lengths=lengths,
        logps=answer_logps(model.model, sequences, lengths),
    )


def answer_logps(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> list[float]:
    """Return the log-probability of each answer at temperature 1."""
    import torch

    found = []
    with torch.inference_mode():
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            row = torch.tensor([ids])
            logps = model(input_ids=row).logits[0, start - 1 : -1].float().log_softmax(-1)
            found.append(float(logps.gather(-1, row[0, start:, None]).sum()))
    return found


def score(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Return a reward model's score of each sequence, at its last token.

    Reward models are trained to score an answer at the token that ends it.
    """
    import torch

    with torch.inference_mode():
        return [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in sequences]


def win_rate(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the share of questions on which ``own`` is higher, in percent; a tie counts half.

    >>> win_rate([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 3.0, 4.0])
    62.5
    """
    wins = [(a > b) + (a == b) / 2 for a, b in zip(own, other, strict=True)]
    return 100 * sum(wins) / len(wins)


def compare(models: dict[str, Path], reward_model: Path) -> list[dict[str, Any]]:
    """Return the figures of every model, compared with the first one.

    Args:
        models: exported folders by name.
        reward_model: the folder of a one-label classifier with the same tokenizer.
    """
    from preference import is_courteous, is_right, read_test_rows
    from transformers import AutoModelForSequenceClassification

    from trainer.inference.loading import Loading, load_chat_model

    rows = read_test_rows()
    questions = [row["prompt"] for row in rows]
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    first: tuple[PreTrainedModel, list[float], list[float]] | None = None
    figures = []
    for name, folder in models.items():
        model = load_chat_model(folder, Loading(precision="fp32"))
        answers = draw_answers(model, questions)
        scores = score(judge, answers.sequences)
        courteous = [float(is_courteous(text)) for text in answers.texts]
        right = [is_right(row, text) for row, text in zip(rows, answers.texts, strict=True)]
        first = first or (model.model, scores, courteous)
        there = answer_logps(first[0], answers.sequences, answers.prompt_lengths)
        figures.append(
            {
                "model": name,
                "score": mean(scores),
                "wins_by_score": win_rate(scores, first[1]),
                "wins_by_rule": win_rate(courteous, first[2]),
                "courteous": 100 * mean(courteous),
                "right": 100 * mean(right),
                "kl_per_answer": mean(a - b for a, b in zip(answers.logps, there, strict=True)),
                "num_tokens": mean(answers.lengths),
                "answers": answers.texts,
            }
        )
    return figures


def mean(values: Any) -> float:
    """Return the mean of some numbers."""
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
