"""Loading, saving, identity of tokenizers, and the check of a pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tokenizer.load import (
    embedding_rows,
    fingerprint,
    load_tokenizer,
    num_ids,
    save_tokenizer,
    vocab_size,
)
from tokenizer.merge import merge_clean
from tokenizer.pair import check_pair, write_pair_manifest
from tokenizer.spm import processor_from
from tokenizer.train import train_pieces
from trainer.errors import ConfigError, DataError

HARD_TEXTS = [
    "",
    " ",
    "Hello world",
    "  leading and  double   spaces ",
    "tab\tand\nline\r\nends\n",
    "中華民國 ABC 123 🙂 été ﬁ ①",
    "▁ literally ▁▁",
    "e\u0301 combining, zero\u200bwidth, \u3000wide",
    "        indented = [1, 2]",
]


def save_model(folder: Path, rows: int, tied: bool = False) -> Path:
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_file(small_base: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.model"
    path.write_bytes(small_base)
    return path


def test_ids_and_text_equal_sentencepiece(small_base: bytes, base_file: Path) -> None:
    processor, tokenizer = processor_from(small_base), load_tokenizer(base_file)
    for text in HARD_TEXTS:
        ids = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [processor.bos_id(), *ids]
        assert tokenizer.decode(ids) == processor.decode(ids)
        assert processor.decode(ids) == text.replace("▁", " ")  # SentencePiece's own sign for it
    assert tokenizer.unk_token_id == processor.unk_id()
    assert tokenizer.eos_token_id == processor.eos_id()


@pytest.mark.parametrize("name", ["llama2/tokenizer.model", "mistral/tokenizer.model.v1"])
def test_ids_of_published_tokenizers_equal_sentencepiece(data_dir: Path, name: str) -> None:
    path = data_dir / "tokenizers" / name
    processor, tokenizer = processor_from(path.read_bytes()), load_tokenizer(path)
    for text in HARD_TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)


def test_unigram_with_a_normaliser_equals_sentencepiece(data_dir: Path) -> None:
    path = data_dir / "tokenizers/chinese_sp/chinese_sp.model"
    processor, tokenizer = processor_from(path.read_bytes()), load_tokenizer(path)
    for text in ("今天，天氣很好！", "  兩個  空格 ", "ＡＢＣ１２３ full width", "中華民國"):
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)


def test_saved_folder_loads_in_plain_transformers(small_base: bytes, tmp_path: Path) -> None:
    save_tokenizer(small_base, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    processor, tokenizer = processor_from(small_base), AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    assert (tmp_path / "tokenizer.model").read_bytes() == small_base
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it as well


def test_folder_with_only_a_sentencepiece_file_takes_its_padding_token(data_dir: Path) -> None:
    tokenizer = load_tokenizer(data_dir / "tokenizers/chinese-alpaca-2")
    assert (num_ids(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id) == (55296, 32000, 1)


def test_fingerprint_survives_saving_and_sees_a_change(small_base: bytes, tmp_path: Path) -> None:
    first = save_tokenizer(small_base, tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    first.add_tokens(["<new>"])
    first.save_pretrained(tmp_path / "c")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "c")


def test_fingerprint_of_a_model_file_is_that_of_its_bytes(base_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tokenizer.model"
    shutil.copyfile(base_file, copy)
    assert fingerprint(copy) == fingerprint(base_file) == fingerprint(tmp_path)
    copy.write_bytes(base_file.read_bytes() + b" ")
    assert fingerprint(copy) != fingerprint(base_file)


def test_nothing_there_and_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.model"):
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    (empty := tmp_path / "empty.model").touch()
    with pytest.raises(DataError, match="is empty"):
        load_tokenizer(empty)
    (text := tmp_path / "text.model").write_text("this is no model" * 20)
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(text)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_pair_without_manifest_compares_sizes(base_file: Path, tmp_path: Path) -> None:
    size = vocab_size(base_file)
    check_pair(save_model(tmp_path / "fits", size + 24), base_file)
    small = save_model(tmp_path / "small", size - 1)
    assert embedding_rows(small) == size - 1
    with pytest.raises(ConfigError, match=rf"{size} ids.* {size - 1} embedding rows"):
        check_pair(small, base_file)


def test_rows_come_from_the_config_when_there_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 77}))
    assert embedding_rows(tmp_path) == 77
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="vocab_size"):
        embedding_rows(tmp_path)


def test_pair_with_manifest_refuses_another_tokenizer_of_fitting_size(
    small_base: bytes, base_file: Path, tmp_path: Path
) -> None:
    pieces = train_pieces(["山水之間，今天天氣好，山水有情"], 20)
    other = tmp_path / "other"
    save_tokenizer(merge_clean(small_base, pieces).model_bytes, other)
    model = save_model(tmp_path / "model", 512)
    save_tokenizer(small_base, tmp_path / "own")
    manifest = write_pair_manifest(model, tmp_path / "own", {"real_rows": 400})
    assert (manifest["embedding_rows"], manifest["real_rows"]) == (512, 400)
    check_pair(model, tmp_path / "own")
    check_pair(model, base_file)  # the SentencePiece file it was made from
    with pytest.raises(ConfigError, match=r"ids, the model 512 embedding rows, made for \d+ ids"):
        check_pair(model, other)


def test_damaged_safetensors_header_is_named(tmp_path: Path, base_file: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(DataError, match=r"model\.safetensors is not a safetensors file"):
        check_pair(tmp_path, base_file)
