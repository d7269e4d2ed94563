"""The vocabulary stage as a run: outputs, reruns, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tokenizer.load import load_tokenizer, save_tokenizer, vocab_size
from tokenizer.pair import check_pair
from tokenizer.train import train_pieces
from trainer.config import build, load_config
from trainer.errors import ConfigError, DataError, StorageError
from trainer.stage import Context
from trainer.stages.vocab import Vocab

REPO = Path(__file__).resolve().parents[3]
CHINESE = [
    "山水之間有人家，人家之間有山水。",
    "今天天氣好，明天天氣也好。",
    "人在山水之間，天氣好的日子出門走一走。",
] * 4
ENGLISH = ["The wolf went away from the hills.", "It came back in the rain, 12 days later."] * 4
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

OTHER_GROUPS = ("tokenizer", "engine", "optim", "schedule", "peft", "loop", "log", "cluster")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*ENGLISH * 5, "中 文 人 天"]),
        model_writer=writer,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("base") / "base.model"
    path.write_bytes(writer.getvalue())
    return path


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    for name, texts in (("zh", CHINESE), ("en", ENGLISH)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: {"paths": [str(tmp_path / f"{name}.jsonl")]} for name in ("zh", "en")}


Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs the stage: model, sources and stage fields → run folder."""

    def start(
        model: Path | None = None,
        sources: dict[str, Any] | None = None,
        out: str = "out",
        **fields: Any,
    ) -> Path:
        config = load_config(
            {
                "name": "test",
                "run_dir": str(tmp_path / out),
                "stage": {"name": "vocab"},
                "model": {
                    "name": "m",
                    "path": str(model) if model else None,
                    "architecture": None if model else ARCHITECTURE,
                },
                "data": {"sources": sources or {}},
                **{key: {} for key in OTHER_GROUPS},
            }
        )
        problems: list[str] = []
        stage = build(Vocab, fields, "stage", problems)
        assert stage is not None, problems
        stage.run(Context(config, tmp_path / out))
        return tmp_path / out

    return start


def save_model(folder: Path, rows: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=rows, **ARCHITECTURE)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_compatible_run_writes_the_published_bytes(run: Run) -> None:
    data = REPO.parent / "shared/data/tokenizers"
    if not data.is_dir():
        pytest.skip(f"no real data at {data}")
    out = run(
        base_tokenizer=str(data / "llama2/tokenizer.model"),
        pieces=str(data / "chinese_sp/chinese_sp.model"),
        merge="compatible",
    )
    written = (out / "tokenizer/tokenizer.model").read_bytes()
    assert hashlib.sha256(written).hexdigest() == (
        "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
    )
    assert len(AutoTokenizer.from_pretrained(out / "tokenizer")) == 49_953
    audit = json.loads((out / "audit.json").read_text())
    assert len(audit["dead"]["pieces"]["slow"]) == 345
    assert "中華民國" in audit["dead"]["pieces"]["slow"]
    assert not (out / "model").exists()


def test_train_merge_resize_audit(
    run: Run, base: Path, sources: dict[str, Any], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", vocab_size(base))
    sentences = ["山水之間有人家。", "The wolf went away."]
    out = run(
        model,
        sources,
        base_tokenizer=str(base),
        vocab_size=[45, 30],
        extra_pieces=["<pad>"],
        audit_sentences=sentences,
    )
    new = vocab_size(out / "tokenizer")
    check_pair(out / "model", out / "tokenizer")
    check_pair(out / "model", out / "model")
    with pytest.raises(ConfigError, match="is not the tokenizer"):
        check_pair(out / "model", base)
    resized = AutoModelForCausalLM.from_pretrained(out / "model")
    assert resized.get_output_embeddings().weight.shape[0] == -(-new // 64) * 64
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.pad_token == "<pad>"
    logits = resized(**tokenizer(sentences[0], return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    audit = json.loads((out / "audit.json").read_text())
    assert audit["dead"]["count"] == audit["drift"]["changed"] == 0
    assert audit["drift"]["lines"] >= 2
    assert [audit["parity"][name]["different"] for name in ("zh", "en")] == [0, 0]
    zh = audit["sources"]["zh"]
    assert zh["after"]["tokens_per_character"] < 0.6 * zh["before"]["tokens_per_character"]
    assert audit["sources"]["en"]["before"] == audit["sources"]["en"]["after"]
    assert [point["pieces"] for point in audit["curve"]] == [0, 30, 45]
    density = [point["tokens_per_character"] for point in audit["curve"]]
    assert density == sorted(density, reverse=True)
    assert audit["sentences"][1]["before"] == audit["sentences"][1]["after"]
    page = (out / "audit.html").read_text(encoding="utf-8")
    assert sentences[0] in page
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"tokenizer/tokenizer.model", "model/model.safetensors", "audit.html"} <= set(
        manifest["files"]
    )


def test_rerun_is_a_no_op_that_says_so(
    run: Run, base: Path, sources: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"base_tokenizer": str(base), "vocab_size": 40}
    out = run(sources=sources, **fields)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    run(sources=sources, **fields)
    assert "nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "audit.html").unlink()  # an output that is gone is made again
    run(sources=sources, **fields)
    assert (out / "audit.html").is_file()
    with pytest.raises(ConfigError, match=r"made from other inputs \(stage differ"):
        run(sources=sources, **{**fields, "vocab_size": 41})
    source = Path(sources["zh"]["paths"][0])
    source.write_text(source.read_text(encoding="utf-8") * 2, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"made from other inputs \(sources differ"):
        run(sources=sources, **fields)


def test_interrupted_run_is_made_again(run: Run, base: Path, sources: dict[str, Any]) -> None:
    fields = {"base_tokenizer": str(base), "vocab_size": 40}
    out = run(sources=sources, **fields)
    whole = (out / "tokenizer/tokenizer.json").read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    manifest.update(complete=False, files={})
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "tokenizer/tokenizer.json").write_text("half")
    run(sources=sources, **fields)
    assert (out / "tokenizer/tokenizer.json").read_bytes() == whole


def test_foreign_outputs_are_not_touched(
    run: Run, base: Path, sources: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model/precious").touch()
    with pytest.raises(ConfigError, match="already holds model"):
        run(sources=sources, base_tokenizer=str(base), vocab_size=40)
    assert (tmp_path / "out/model/precious").exists()


def test_byte_level_base(run: Run, sources: dict[str, Any], tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(ENGLISH, trainer)
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    base = tmp_path / "bytes"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(base)
    model = save_model(tmp_path / "model", vocab_size(base) + 3)
    save_tokenizer(load_tokenizer(base), model)
    out = run(model, sources, vocab_size=40, extra_pieces=["<|tool|>"])  # base: the model's own
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.decode(tokenizer.encode("山水之間<|tool|>")) == "山水之間<|tool|>"
    assert tokenizer.convert_tokens_to_ids("<|tool|>") == vocab_size(out / "tokenizer") - 1
    audit = json.loads((out / "audit.json").read_text())
    assert (audit["parity"], audit["drift"]["changed"], audit["dead"]["count"]) == (None, 0, 0)
    zh = audit["sources"]["zh"]
    assert zh["after"]["tokens"] < 0.5 * zh["before"]["tokens"]
    check_pair(out / "model", out / "tokenizer")
    with pytest.raises(ConfigError, match="no SentencePiece model; use merge=clean"):
        run(model, sources, out="other", vocab_size=40, merge="compatible")


def test_given_pieces_are_cut_to_the_size(run: Run, base: Path, tmp_path: Path) -> None:
    pieces = tmp_path / "pieces.model"
    pieces.write_bytes(train_pieces(CHINESE, 45))
    fields = {"base_tokenizer": str(base), "pieces": str(pieces)}
    few = vocab_size(run(out="few", vocab_size=20, **fields) / "tokenizer")
    everything = vocab_size(run(out="all", **fields) / "tokenizer")
    assert few < everything
    with pytest.raises(DataError, match=r"vocab_size=99: .* has 45 pieces"):
        run(out="many", vocab_size=99, **fields)


def test_rejected_rows_are_written(run: Run, base: Path, sources: dict[str, Any]) -> None:
    path = Path(sources["en"]["paths"][0])
    rows = path.read_text(encoding="utf-8") * 100 + "{broken\n"
    path.write_text(rows, encoding="utf-8")
    out = run(sources=sources, base_tokenizer=str(base), vocab_size=40)
    (reject,) = (out / "rejects-en.jsonl").read_text().splitlines()
    assert json.loads(reject)["row"] == rows.count("\n")


def test_mismatched_pair_is_refused_before_anything_is_written(
    run: Run, base: Path, sources: dict[str, Any], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", 100)
    ids = vocab_size(base)
    with pytest.raises(ConfigError, match=rf"{ids} ids, the model 100 embedding rows"):
        run(model, sources, base_tokenizer=str(base), vocab_size=40)
    assert not (tmp_path / "out").exists()


def test_contradictions_are_all_named(run: Run) -> None:
    with pytest.raises(ConfigError) as info:
        run(
            character_coverage=0.5,
            scripts=["hna"],
            pad_to_multiple=0,
            vocab_size=[2],
        )
    for text in (
        "stage.base_tokenizer is null",
        "stage.pieces is null and data.sources is empty",
        "'hna', which is no script; did you mean han",
        "stage.character_coverage=0.5: expected 0.98 to 1",
        "stage.pad_to_multiple=0",
        "stage.vocab_size=2: expected 4 or more",
    ):
        assert text in str(info.value)


def test_missing_files_and_bad_models_are_named(run: Run, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_tokenizer=nowhere\.model does not exist"):
        run(base_tokenizer="nowhere.model", pieces=str(base))
    with pytest.raises(ConfigError, match=r"pieces=nowhere\.model is no file"):
        run(base_tokenizer=str(base), pieces="nowhere.model")
    (bad := tmp_path / "bad.model").write_text("no model")
    with pytest.raises(DataError, match=r"stage\.pieces is not a SentencePiece model"):
        run(base_tokenizer=str(base), pieces=str(bad))


def test_full_disk_is_a_storage_error(
    run: Run, base: Path, sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("trainer.stages.vocab.write_text", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        run(sources=sources, base_tokenizer=str(base), vocab_size=40)


def test_yaml_names_every_field_with_a_meaning() -> None:
    text = (REPO / "conf/stage/vocab.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    values = yaml.safe_load(text)["stage"]
    assert values.pop("name") == Vocab.name
    assert set(values) == {entry.name for entry in dataclasses.fields(Vocab)}
    stage = build(Vocab, values, "stage", problems := [])
    assert (problems, stage is not None) == ([], True)
    assert all("#" in line for line in text.splitlines()[5:-5])
