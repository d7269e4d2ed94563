"""Keys of the verbs that take a model: their files, texts as typed, nearest names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launch.chat import Opening
from launch.compose import compose_verb
from launch.generate import Generation
from launch.options import read_options
from launch.serve import Serving
from trainer.errors import ConfigError
from trainer.inference.decoding import Decoding
from trainer.inference.loading import Loading

CLASSES: dict[str, tuple[type, ...]] = {
    "chat": (Opening, Loading, Decoding),
    "generate": (Generation, Loading, Decoding),
    "serve": (Serving, Loading, Decoding),
}
# What a verb's own file sets otherwise than the dataclasses.
OTHERWISE: dict[str, dict[str, Any]] = {
    "chat": {},
    "generate": {
        "temperature": 0.0,
        "cluster": {"nodes": 1, "gpus_per_node": 1, "timeout_s": 86400},
    },
    "serve": {"seed": None},
}


@pytest.mark.parametrize("verb", CLASSES)
def test_file_lists_every_field_with_its_default(verb: str) -> None:
    fields: dict[str, Any] = {}
    for cls in CLASSES[verb]:
        fields |= dataclasses.asdict(cls())
    assert compose_verb(verb, []) == fields | OTHERWISE[verb]


def decoding(*words: str) -> Decoding:
    (built,) = read_options("chat", list(words), Decoding)
    return built


@pytest.mark.parametrize(
    ("word", "stop"),
    [
        ("stop=。", ["。"]),
        ("stop=\n", ["\n"]),
        ("stop=a, b: {c} ${d}", ["a, b: {c} ${d}"]),
        ('stop=["###","。"]', ["###", "。"]),
        ("stop=[]", []),
    ],
)
def test_stop_is_taken_as_typed(word: str, stop: list[str]) -> None:
    assert decoding(word).stop == stop


@pytest.mark.parametrize(
    ("word", "system"),
    [
        ("system=你是唐代詩人，只用五言。", "你是唐代詩人，只用五言。"),
        ('system=Answer in JSON: {"a": [1]} = ${x}', 'Answer in JSON: {"a": [1]} = ${x}'),
        ("system='\"quoted\"'", '"quoted"'),
        ("system=null", None),
    ],
)
def test_texts_need_no_quotes_of_hydras(word: str, system: str | None) -> None:
    (opening,) = read_options("chat", [word], Opening)
    assert opening.system == system


def test_columns_may_have_chinese_names() -> None:
    (generation,) = read_options(
        "generate", ["columns.prompt=問題 一", "columns.response=答"], Generation
    )
    assert generation.columns == {"prompt": "問題 一", "response": "答"}


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_options("chat", ["temperature=hot", "step=-1", "precision=fp8"], Loading, Decoding)
    text = str(caught.value)
    assert "temperature='hot': expected float" in text and "expected auto|fp32|bf16|fp16" in text
    with pytest.raises(ConfigError) as caught:
        read_options("chat", ["top_k=-1", "step=-1"], Loading, Decoding)
    assert str(caught.value).splitlines() == [
        "step=-1: expected 0 or more",
        "top_k=-1: expected 0 (off) or more",
    ]


def test_secret_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as caught:
        read_options("serve", ["api_key=sk-abcdefghij0123456789"], Serving)
    assert "api_key" in str(caught.value) and "abcdefghij" not in str(caught.value)
