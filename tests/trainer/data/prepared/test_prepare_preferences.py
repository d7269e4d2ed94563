"""Preferences and prompts through preparation: the store, what is left out, and --check."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import sentencepiece_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tokenizer.load import load_tokenizer, save_tokenizer
from trainer.config import DataConfig, SourceConfig
from trainer.data.chats.chat import resolve_template
from trainer.data.chats.chat_encoder import ChatEncoder
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.layouts import Layout
from trainer.data.chats.pair_encoder import PairSpec
from trainer.data.chats.prompt_encoder import PromptSpec
from trainer.data.prepared.chat_shards import add_chats
from trainer.data.prepared.check import check
from trainer.data.prepared.check_pairs import answer_lengths
from trainer.data.prepared.drafts import start_draft
from trainer.data.prepared.prepare import plan_sources, prepare
from trainer.data.prepared.store import SourceStore, hash_text, verify
from trainer.data.prepared.summary import summarise
from trainer.data.reading.raw import Row
from trainer.data.reading.records import JsonLine
from trainer.errors import DataError

NUM_PAIRS = 40
PAIRS = [
    {"prompt": f"question {i}", "chosen": f"good {i * 7919 % 1009} 海", "rejected": f"bad {i}"}
    for i in range(NUM_PAIRS)
]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(sentencepiece_tokenizer(), folder)
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def make_data(
    folder: Path, rows: list[Any], content: Any = "preferences", **changes: Any
) -> DataConfig:
    options: dict[str, Any] = {
        "content": content,
        "template": "chatml",
        "store_dir": str(folder / "store"),
        "num_processes": 1,
        "max_length": 512,
    }
    source = SourceConfig([str(write(folder / "a.json", rows))])
    return DataConfig({"pairs": source}, **(options | changes))


def only(data: DataConfig, tokenizer_path: Path) -> SourceStore:
    return prepare(data, tokenizer_path).sources["pairs"]


def render(tokenizer_path: Path, question: str, answer: str | None) -> list[int]:
    """Return the ids of a question with its answer, or of the prompt for one."""
    tokenizer = load_tokenizer(tokenizer_path)
    messages = [Message("user", question)]
    messages += [Message("assistant", answer)] if answer is not None else []
    ids = tokenizer.apply_chat_template(
        Conversation(tuple(messages)).as_chat(),
        chat_template=resolve_template(tokenizer, "chatml"),
        add_generation_prompt=answer is None,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)  # type: ignore[arg-type]


def listed(source: SourceStore) -> list[tuple[int, str]]:
    lines = (source.folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((row["row"], row["reason"]) for row in map(json.loads, lines))


def show(renderable: Any, tmp_path: Path) -> str:
    with (tmp_path / "out").open("w") as out:
        console = Console(width=200, record=True, file=out)
        console.print(renderable, markup=False)
        return console.export_text()


def test_a_pair_is_one_document(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{**row, "margin": i / 4} for i, row in enumerate(PAIRS)]
    source = only(make_data(tmp_path, rows), tokenizer_path)
    verify(source.folder)
    assert source.content == "preferences" and len(source.num_chars) == NUM_PAIRS
    assert source.first_lengths is not None and source.margins is not None
    assert source.margins.tolist() == [i / 4 for i in range(NUM_PAIRS)]
    end = load_tokenizer(tokenizer_path).convert_tokens_to_ids("<|im_end|>")
    for i in (0, 17, NUM_PAIRS - 1):
        row = PAIRS[i]
        first, second = (
            render(tokenizer_path, row["prompt"], row[side]) for side in ("chosen", "rejected")
        )
        assert source.document(i).tolist() == first + second
        assert source.first_lengths[i] == len(first)
        weights = source.document_weights(i)
        assert weights is not None
        prompt = len(render(tokenizer_path, row["prompt"], None))
        for ids, side in ((first, weights[: len(first)]), (second, weights[len(first) :])):
            closing = ids[::-1].index(end)  # the newline after the end token is not learnt
            learnt = len(ids) - prompt - closing
            assert side.tolist() == [0.0] * prompt + [1.0] * learnt + [0.0] * closing
        answers = row["chosen"] + row["rejected"]
        assert source.num_chars[i] == len(answers)
        assert source.num_bytes[i] == len(answers.encode())
        assert source.text_hashes[i] == hash_text(row["prompt"].encode())


def test_labelled_answers_are_alone(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "yes", "label": i % 3 > 0} for i in range(9)]
    source = only(make_data(tmp_path, rows), tokenizer_path)
    assert source.first_lengths is not None
    lengths = np.diff(source.offsets)
    assert source.first_lengths.tolist() == [int(n) * (i % 3 > 0) for i, n in enumerate(lengths)]
    chats = source.manifest["chats"]
    assert (chats.get("kept", 0), chats["desirable"], chats["undesirable"]) == (0, 6, 3)
    assert source.document(1).tolist() == render(tokenizer_path, "q1", "yes")
    good, bad = answer_lengths(source)
    assert ((good > 0) == (source.first_lengths > 0)).all() and ((bad > 0) == (good == 0)).all()


def test_rows_and_pairs_add_up(tmp_path: Path, tokenizer_path: Path) -> None:
    long = "word " * 300
    ranked = [
        *[{"prompt": f"q{i}", "response": ["a", "b", "c"]} for i in range(10)],
        {"prompt": "q", "response": ["a", "b", "a"]},
        {"prompt": "q", "response": ["a", "b", long]},
        {"prompt": "q", "response": ["a", "a"]},
        {"prompt": "q", "response": "a"},
        {"prompt": " ", "response": ["a", "b"]},
    ]
    data = make_data(tmp_path, ranked, max_bad_row_share=0.5)
    source = only(data, tokenizer_path)
    manifest, chats = source.manifest, source.manifest["chats"]
    assert manifest["rows"] == {"read": 15, "rejected": 3, "short": 0}
    assert (chats["kept"], chats["long"], chats["unlike"]) == (30 + 2 + 1, 2, 1)
    assert chats["equal"] == 2
    assert chats["kept"] == manifest["num_documents"]
    reasons = [(row, reason.partition(": ")[0]) for row, reason in listed(source)]
    assert reasons == [
        (11, "answers 1 and 3"),
        *[(12, "longer than data.max_length=512")] * 2,
        (13, "answers 1 and 2"),
        (14, "column 'response' holds no list of ranked answers"),
        (15, "answers 1 and 2"),
    ]
    assert sum(manifest["lengths"]["up_to"].values()) == chats["kept"] + chats["long"]
    text = show(summarise(prepare(data, tokenizer_path), data), tmp_path)
    assert "2 pairs were left out: their last turn with both answers does not fit" in text
    assert "1 pairs of ranked lists were left out, with others of them kept" in text
    assert "rows left out and their reasons are in" in text
    best = dataclasses.replace(data.sources["pairs"], ranked_pairs="best")
    fewer = only(dataclasses.replace(data, sources={"pairs": best}), tokenizer_path)
    assert fewer.manifest["chats"]["kept"] == 20 + 1 + 1


@pytest.mark.faults(row=15)
def test_too_many_bad_rows_stop(tmp_path: Path, tokenizer_path: Path) -> None:
    bad = {"prompt": "q", "chosen": "same", "rejected": "same"}
    with pytest.raises(DataError, match=r"2 of 42 rows rejected.*answer are equal"):
        prepare(make_data(tmp_path, [*PAIRS, bad, bad]), tokenizer_path)


def test_same_prompt_is_on_one_side(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{"prompt": f"q{i % 15}", "chosen": f"a{i}", "rejected": "b"} for i in range(60)]
    source = only(make_data(tmp_path, rows, holdout_share=0.4), tokenizer_path)
    sides = [{int(i) % 15 for i in source.document_ids(held_out)} for held_out in (True, False)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_what_is_wanted_names_the_store(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": ["a", "b", "c"]} for i in range(3)]
    data = make_data(tmp_path, rows)

    def key(**changes: Any) -> str:
        return plan_sources(dataclasses.replace(data, **changes), tokenizer_path)[0].key

    best = dataclasses.replace(data.sources["pairs"], ranked_pairs="best")
    keys = [
        key(),
        key(content="prompts"),
        key(max_length=64),
        key(template="llama2"),
        key(system="Be kind."),
        key(sources={"pairs": best}),
    ]
    assert len(set(keys)) == len(keys)
    assert key(train_on="everything") == key(train_on="last") == key()  # only answers are learnt


def test_processes_make_the_same_store(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.prepared.workers.BYTES_PER_PROCESS", 1 << 10)
    data = make_data(tmp_path, PAIRS)
    more = write(tmp_path / "b.json", PAIRS[:20])
    both = SourceConfig([*data.sources["pairs"].paths, str(more)])
    arrays = []
    for number in (1, 2):
        store_dir = str(tmp_path / f"store{number}")
        changes: dict[str, Any] = {"store_dir": store_dir, "num_processes": number}
        whole = dataclasses.replace(data, sources={"pairs": both}, **changes)
        arrays.append(only(whole, tokenizer_path).manifest["arrays"])
    assert arrays[0] == arrays[1]


def test_prompts_end_in_what_opens_an_answer(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [
        {"q": "one", "a": "1 海"},
        {"q": "two", "a": ""},
        {"q": "one", "a": "another"},
        {"q": "word " * 300, "a": "long"},
        {"q": "", "a": "nothing asked"},
    ]
    data = make_data(tmp_path, rows, "prompts", max_bad_row_share=0.5)
    source = only(data, tokenizer_path)
    assert source.content == "prompts" and source.weights is None and source.first_lengths is None
    assert [source.document(i).tolist() for i in range(3)] == [
        render(tokenizer_path, question, None) for question in ("one", "two", "one")
    ]
    assert [source.answer(i) for i in range(3)] == ["1 海", None, "another"]
    manifest = source.manifest
    assert manifest["rows"] == {"read": 5, "rejected": 1, "short": 0}
    assert (manifest["chats"]["kept"], manifest["chats"]["long"]) == (3, 1)
    assert manifest["lengths"]["duplicates"] == 1
    assert [(row, reason.partition(":")[0]) for row, reason in listed(source)] == [
        (4, "longer than data.max_length=512"),
        (5, "message 1, the user's, is empty"),
    ]
    text = show(summarise(prepare(data, tokenizer_path), data), tmp_path)
    assert "1 prompts were left out: they do not fit into data.max_length" in text
    assert "1 prompts occurred before, word for word: they are kept" in text


def test_prompts_of_pairs_carry_the_better_answer(tmp_path: Path, tokenizer_path: Path) -> None:
    source = only(make_data(tmp_path, PAIRS, "prompts"), tokenizer_path)
    for i in (0, 5, NUM_PAIRS - 1):
        assert source.document(i).tolist() == render(tokenizer_path, PAIRS[i]["prompt"], None)
        assert source.answer(i) == PAIRS[i]["chosen"]


def test_a_question_a_line(tmp_path: Path, tokenizer_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_bytes("one?\n\n二？\r\n\x00\n".encode())
    data = make_data(tmp_path, [], "prompts", max_bad_row_share=0.5)
    data = dataclasses.replace(data, sources={"pairs": SourceConfig([str(path)])})
    source = only(data, tokenizer_path)
    assert [source.document(i).tolist() for i in range(2)] == [
        render(tokenizer_path, question, None) for question in ("one?", "二？")
    ]
    assert source.answer(0) is None and listed(source) == [(4, "NUL character at offset 0")]
    with pytest.raises(DataError, match="plain text, which holds no conversations"):
        prepare(dataclasses.replace(data, content="preferences"), tokenizer_path)


def test_other_content_has_no_answers(tmp_path: Path, tokenizer_path: Path) -> None:
    source = only(make_data(tmp_path, PAIRS), tokenizer_path)
    assert source.answer(0) is None
    rows = [{"instruction": "q", "output": "a"}]
    chats = only(make_data(tmp_path, rows, "conversations", template="chatml"), tokenizer_path)
    assert chats.content == "conversations" and chats.first_lengths is None
    with pytest.raises(TypeError, match="pairs holds conversations, not preferences"):
        answer_lengths(chats)


def test_check_of_pairs(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "one two three four", "rejected": "one", "margin": 2},
        {"prompt": "r", "chosen": "one", "rejected": "one two", "margin": -1},
        {"prompt": "s", "chosen": "one", "rejected": "two", "margin": 0.5},
        {"prompt": "s", "chosen": "one", "rejected": "two", "margin": 0.5},
        {"prompt": "t", "chosen": "one", "rejected": "one"},
    ]
    found = check(make_data(tmp_path, rows, max_bad_row_share=0.5), tokenizer_path)
    text = show(found.report, tmp_path)
    assert found.problems == []
    assert "a.json: pairs (text); prompt_response; chosen, margin, prompt, rejected; json" in text
    assert "margins: 4 pairs, median 0.5, from -1 to 2; 1 below 0" in text
    assert "1 pairs have a margin below 0" in text
    assert "1 pairs occurred before" in text
    assert "left out 1 times: the chosen and the rejected answer are equal" in text
    assert "rejected: median" in text and "the chosen answer is the longer one in" in text
    assert "⟦one two three four<|im_end|>⟧" in text and "rejected:" in text
    assert "a.json:1 as the model sees it" in text
    counted = dict(zip(("pairs", "equal"), (4, 1), strict=True))
    header, values = (line.split() for line in text.splitlines()[:2])
    # "held out" and "too long" are two words each.
    names = " ".join(header).replace("held out", "held").replace("too long", "long").split()
    shown = dict(zip(names, values, strict=True))
    assert {name: int(shown[name]) for name in counted} == counted


def test_check_of_labels_and_prompts(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"yes {i}", "label": True} for i in range(3)]
    text = show(check(make_data(tmp_path, rows), tokenizer_path).report, tmp_path)
    assert "lone answers: 3 desirable, 0 undesirable" in text
    assert "no answer is labelled undesirable: KTO needs both labels" in text
    text = show(check(make_data(tmp_path, rows, "prompts"), tokenizer_path).report, tmp_path)
    assert "<|im_start|>assistant" in text and "answer of the file: yes 0" in text


ANSWERS = st.sampled_from(["one", "two", "two ", "", "word " * 40, None, 5])
ROWS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"prompt": st.sampled_from(["q", "", "word " * 40, ["x"]]), "x": ANSWERS}
    )
    | st.fixed_dictionaries({"prompt": st.just("q"), "chosen": ANSWERS, "rejected": ANSWERS})
    | st.fixed_dictionaries({"prompt": st.just("q"), "a": st.lists(ANSWERS, max_size=3)})
    | st.text(max_size=3),
    max_size=6,
)
LAYOUTS = {
    "pairs": Layout(
        "prompt_response",
        (("chosen", "chosen"), ("prompt", "prompt"), ("rejected", "rejected")),
        "jsonl",
        preference="pairs",
    ),
    "ranked": Layout(
        "prompt_response",
        (("prompt", "prompt"), ("response", "a")),
        "jsonl",
        preference="ranked",
        ranked_pairs="all",
    ),
    "prompts": Layout("prompt_response", (("prompt", "prompt"),), "jsonl", prompts=True),
}


@pytest.fixture(scope="module")
def encoders() -> dict[str, ChatEncoder]:
    tokenizer = sentencepiece_tokenizer()
    template = resolve_template(tokenizer, "chatml")
    pairs = PairSpec.of(tokenizer, template, train_on="last", max_length=120).build()
    prompts = PromptSpec.of(tokenizer, template, max_length=60).build()
    return {"pairs": pairs, "ranked": pairs, "prompts": prompts}


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, kind=st.sampled_from(sorted(LAYOUTS)))
def test_every_row_is_accepted_or_rejected(
    rows: list[Any], kind: str, encoders: dict[str, ChatEncoder], tmp_path: Path
) -> None:
    draft, rejects = start_draft(tmp_path / "0.npz", max_bad_row_share=1.0)
    lines = (json.dumps(row).encode() for row in rows)
    raw = (Row(n, len(line), JsonLine(line)) for n, line in enumerate(lines, 1))
    layout = LAYOUTS[kind]
    reported: list[int] = []
    add_chats(
        draft,
        raw,
        Path("a.jsonl"),
        layout,
        encoders[kind],
        rejects,
        lambda _, num_documents: reported.append(num_documents),
    )
    rejects.close()
    assert rejects.num_accepted + rejects.num_rejected == len(rows)
    num_documents = len(draft.columns["num_tokens"])
    assert num_documents == sum(reported) == draft.chats["kept"]
    sizes = [len(ids) // encoders[kind].dtype.itemsize for ids in draft.tokens]
    assert sum(sizes) == sum(draft.columns["num_tokens"])
    assert len(draft.left_out) == draft.chats["long"] + draft.chats["unlike"]
    expected = {"pairs": 120, "ranked": 120, "prompts": 60}[kind]
    assert all(size <= expected for size in draft.columns["num_tokens"])
    if kind == "pairs":
        assert rejects.num_accepted == num_documents + draft.chats["long"]
