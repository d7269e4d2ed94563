"""Built-in templates against strings written by hand from their sources; bad templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_tokenizers import byte_level_tokenizer
from transformers import PreTrainedTokenizerFast

from trainer.data.chats.chat import prompt_ids, prompt_text, stop_token_ids
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.rendering import Renderer
from trainer.data.chats.templates import (
    builtin_templates,
    needed_tokens,
    read_builtin,
    resolve_template,
)
from trainer.data.reading.rows import RowError
from trainer.errors import ConfigError

CHATML = (
    "<|im_start|>system\nS!<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
    "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
    "<|im_start|>assistant\n|A2<|im_end|>\n"
)
LLAMA2 = "<s>[INST] <<SYS>>\nS!\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]| A2 </s>"
# System message S!, questions Q1 and Q2, answers A1 and A2; | is where the second prompt ends.
EXPECTED = {
    "alpaca": "<s>S!\n\n### Instruction:\nQ1\n\n### Response:\nA1</s>\n\n"
    "### Instruction:\nQ2\n\n### Response:\n|A2</s>\n\n",
    "baichuan2": "S!<reserved_106>Q1<reserved_107>A1<reserved_106>Q2<reserved_107>|A2",
    "bloomz": "S!\n\nQ1 A1</s>\nQ2| A2</s>\n",
    "breeze": "<s>S!  [INST] Q1 [/INST] A1 [INST] Q2 [/INST]| A2</s>",
    "chatglm3": "[gMASK]sop<|system|>\n S!<|user|>\n Q1<|assistant|>\n A1<|user|>\n Q2"
    "<|assistant|>|\n A2",
    "chatml": CHATML,
    "falcon": "System: S!\nUser: Q1\nFalcon: A1</s>\nUser: Q2\nFalcon:| A2</s>\n",
    "gemma": "<s><start_of_turn>user\nS!\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1"
    "<end_of_turn>\n<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n|A2"
    "<end_of_turn>\n",
    "glm4": "[gMASK]<sop><|system|>\nS!<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>|\nA2",
    "internlm": "<s><|System|>:S!\n<|User|>:Q1\n<|Bot|>:A1<eoa>\n<|User|>:Q2\n<|Bot|>:|A2<eoa>\n",
    "internlm2": "<s>" + CHATML,
    "llama2": LLAMA2,
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n|A2<|eot_id|>",
    "mistral": "<s>[INST] S!\n\nQ1[/INST] A1</s>[INST] Q2[/INST]| A2</s>",
    "mixtral": "<s>[INST] S!\n\nQ1 [/INST] A1</s>[INST] Q2 [/INST]| A2</s>",
    "phi": "Instruct: S!\n\nQ1\nOutput: A1</s>\nInstruct: Q2\nOutput:| A2</s>\n",
    "phi3": "<|system|>\nS!<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
    "<|user|>\nQ2<|end|>\n<|assistant|>\n|A2<|end|>\n",
    "plain": "<s>S!\n\nQ1\nA1</s>\nQ2\n|A2</s>\n",
    "qwen": CHATML,
    "qwen3": CHATML.replace("|A2", "|<think>\n\n</think>\n\nA2"),
    "taide": LLAMA2,
    "vicuna": "<s>S! USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:| A2</s>",
    "xverse": "S!\n\nHuman: Q1\n\nAssistant: A1</s>Human: Q2\n\nAssistant:| A2</s>",
    "yi": CHATML,
    "yuan": "S!\n\nQ1<sep>A1<eod>\nQ2<sep>|A2<eod>\n",
}
CALL = Message("assistant", "", ({"name": "add", "arguments": {"a": 1}},))
TOOL = {"name": "add", "description": "加", "parameters": {"type": "object", "properties": {}}}
# What a call by an assistant looks like.
CALLS = {
    "glm4": '<|assistant|>add\n{"a": 1}',
    "llama3": '{"name": "add", "parameters": {"a": 1}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>',
    "plain": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call></s>',
    "qwen": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
}
DIALOGUE = (
    Message("system", "S!"),
    Message("user", "Q1"),
    Message("assistant", "A1"),
    Message("user", "Q2"),
    Message("assistant", "A2"),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


def render(tokenizer: PreTrainedTokenizerFast, name: str, chat: Conversation) -> str:
    tokenizer.chat_template = resolve_template(tokenizer, name)
    return str(
        tokenizer.apply_chat_template(chat.as_chat(), tools=chat.tool_schemas(), tokenize=False)
    )


def test_every_template_has_its_expected_text() -> None:
    assert builtin_templates() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_text_and_prompt_are_those_of_the_source(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    text, (prompt, answer) = EXPECTED[name], _split(EXPECTED[name])
    assert render(tokenizer, name, Conversation(DIALOGUE)) == prompt + answer, text
    assert prompt_text(tokenizer, DIALOGUE[:-1]) == prompt
    assert prompt_ids(tokenizer, DIALOGUE[:-1]) == tokenizer.encode(
        prompt, add_special_tokens=False
    )


def _split(marked: str) -> tuple[str, str]:
    """Cut at the | that belongs to no token."""
    places = [
        i
        for i, character in enumerate(marked)
        if character == "|" and "<|" not in marked[i - 1 : i + 1] and "|>" not in marked[i : i + 2]
    ]
    assert len(places) == 1, marked
    return marked[: places[0]], marked[places[0] + 1 :]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_says_source_tokens_system_and_tools(name: str) -> None:
    text = read_builtin(name)
    for word in ("format: ", "tokens: ", "system: ", "tools: "):
        assert f"\n{word}" in text.partition("-#}")[0], word


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_tools_calls_and_results_are_shown(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    messages = (Message("user", "1 + 1?"), CALL, Message("tool", "the sum 2"), DIALOGUE[-1])
    text = render(tokenizer, name, Conversation(messages, (TOOL,)))
    order = [text.index("加"), text.index('{"a": 1}'), text.index("the sum 2"), text.rindex("A2")]
    assert order == sorted(order)
    assert CALLS.get(name, "") in text


def test_taide_follows_the_start_token() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    text = render(tokenizer, "taide", Conversation(DIALOGUE))
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS!")


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("vicuna", "<s>A chat between a curious user"),
        ("alpaca", "<s>Below is an instruction"),
        ("breeze", "<s>You are a helpful AI assistant built by MediaTek Research."),
        ("qwen", "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud."),
        ("llama2", "<s>[INST] Q1 [/INST]"),
        ("yi", "<|im_start|>user\nQ1"),
    ],
)
def test_without_a_system_message(
    tokenizer: PreTrainedTokenizerFast, name: str, begins: str
) -> None:
    assert render(tokenizer, name, Conversation(DIALOGUE[1:])).startswith(begins)


def test_stop_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    def stops(name: str) -> list[str]:
        ids = stop_token_ids(tokenizer, resolve_template(tokenizer, name))
        return [str(tokenizer.convert_ids_to_tokens(i)) for i in ids]

    assert stops("llama2") == ["</s>"]
    assert stops("chatml") == ["</s>", "<|im_end|>"]
    assert stops("glm4") == ["</s>", "<|user|>", "<|observation|>"]
    assert stops("baichuan2") == ["</s>", "<reserved_106>"]


def test_missing_tokens_are_named_with_the_remedy(english_tokenizer: Path) -> None:
    from tokenizer.load import load_tokenizer

    bare = load_tokenizer(english_tokenizer)
    with pytest.raises(ConfigError) as caught:
        resolve_template(bare, "chatml")
    message = str(caught.value)
    assert "data.template=chatml writes <|im_start|>, <|im_end|>" in message
    assert "stage=vocab \"stage.extra_pieces=['<|im_start|>','<|im_end|>']\"" in message
    fitting = message.rpartition(": ")[2].split(", ")
    assert {"alpaca", "llama2", "plain"} <= set(fitting) and "yi" not in fitting
    with pytest.raises(ConfigError, match=r"data.template=auto: .*no chat_template.* alpaca, "):
        resolve_template(bare)


def test_unknown_name_has_the_nearest(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"data.template='lama2' .*did you mean llama2"):
        resolve_template(tokenizer, "lama2")


def test_template_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    with pytest.raises(ConfigError, match=r"own\.jinja cannot be read"):
        resolve_template(tokenizer, str(file))
    file.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    assert resolve_template(tokenizer, str(file)) == file.read_text()
    file.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"own\.jinja cannot be used: chat template: "):
        resolve_template(tokenizer, str(file))
    file.write_text("{% for m in messages %}<|nowhere|>{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"own\.jinja writes <\|nowhere\|>"):
        resolve_template(tokenizer, str(file))


def test_auto_takes_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    own = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = own
    assert resolve_template(tokenizer) == own
    tokenizer.chat_template = {"tool_use": "-", "default": own}
    assert resolve_template(tokenizer) == own


def test_nothing_to_end_an_answer_with() -> None:
    endless = byte_level_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match=r"data\.template=plain needs an end token"):
        resolve_template(endless, "plain")
    assert needed_tokens(resolve_template(endless, "chatml")) == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ ''.format.__self__.__class__.mro() }}",
        "{% set x = messages.append(1) %}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
    ],
)
def test_templates_of_models_stay_in_their_sandbox(template: str) -> None:
    with pytest.raises(RowError, match=r"unsafe|undefined|not safely"):
        Renderer(template, {}, []).render([{"role": "user", "content": "?"}], None)
