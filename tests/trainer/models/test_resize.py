"""Resized models against a resize by full load; initial rows against hand-made ones."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tokenizer.load import fingerprint, load_tokenizer, save_tokenizer, vocab_size
from tokenizer.merge import merge_clean
from tokenizer.pair import check_pair
from tokenizer.train import train_pieces
from trainer.errors import ConfigError, StorageError
from trainer.models.new_rows import iterate_new_rows, mean_row, relate_vocabularies
from trainer.models.resize import model_bytes, resize_model

REPO = Path(__file__).resolve().parents[3]
CHINESE = ["山水之間有人家，人家之間有山水。今天天氣好，明天天氣也好。"] * 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base SentencePiece file and the folder of its extension."""
    folder, writer = tmp_path_factory.mktemp("pair"), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the wolf and the fox went away 山水人"] * 20),
        model_writer=writer,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    base = folder / "base.model"
    base.write_bytes(writer.getvalue())
    merged = merge_clean(base.read_bytes(), train_pieces(CHINESE, 40), extra_pieces=["[PAD]"])
    save_tokenizer(merged.model_bytes, folder / "new")
    return base, folder / "new"


def save_model(folder: Path, rows: int, tied: bool, dtype: torch.dtype, shard: str) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_resize_of_the_loaded_model(
    pair: tuple[Path, Path], tmp_path: Path, tied: bool, shard: str, dtype: torch.dtype
) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), tied, dtype, shard)
    result = resize_model(source, base, new, tmp_path / "out", init="mean", pad_to_multiple=16)
    assert result.tied == tied
    assert result.embedding_rows % 16 == 0
    assert result.embedding_rows - vocab_size(new) < 16
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    old = vocab_size(base)
    means = [m.weight[:old].double().mean(0) for m in (model.model.embed_tokens, model.lm_head)]
    model.resize_token_embeddings(result.embedding_rows, mean_resizing=False)
    with torch.no_grad():
        for matrix, mean in zip((model.model.embed_tokens, model.lm_head), means, strict=True):
            matrix.weight[old:] = mean.to(dtype)
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert resized.dtype == dtype
    assert resized.config.vocab_size == result.embedding_rows
    expected, actual = model.state_dict(), resized.state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    ids = torch.arange(0, result.embedding_rows, 7)[None]
    assert torch.equal(model(ids).logits, resized(ids).logits)
    check_pair(tmp_path / "out", new)


def test_index_of_a_sharded_model_stays_right(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), False, torch.float32, "20KB")
    written = []
    resize_model(source, base, new, tmp_path / "out", progress=written.append)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    values = tensors(tmp_path / "out")
    assert set(index["weight_map"]) == set(values)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    assert len(set(index["weight_map"].values())) > 2
    assert sum(written) == pytest.approx(model_bytes(tmp_path / "out"), rel=0.1)


def test_subpiece_mean_by_hand(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), False, torch.float32, "1GB")
    resize_model(source, base, new, tmp_path / "out", init="subpiece_mean")
    ids = load_tokenizer(base).get_vocab()
    rows = load_tokenizer(new).get_vocab()
    old, resized = tensors(source), tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # 山 and 水 are pieces of the base; 今 is not: three bytes. No ▁ in either.
        mountain_water = old[name][[ids["山"], ids["水"]]].mean(0)
        assert torch.allclose(resized[name][rows["山水"]], mountain_water, atol=1e-7)
        today = old[name][[ids["<0xE4>"], ids["<0xBB>"], ids["<0x8A>"]]].mean(0)
        assert torch.allclose(resized[name][rows["今"]], today, atol=1e-7)
        mean = old[name].mean(0)
        for row in (rows["[PAD]"], resized[name].shape[0] - 1):  # control piece, padding
            assert torch.allclose(resized[name][row], mean, atol=1e-6)


def test_no_prefix_enters_the_subpieces(llama2_and_merged: tuple[Path, Path]) -> None:
    base, new = (load_tokenizer(path) for path in llama2_and_merged)
    vocabulary = relate_vocabularies(base, new)
    prefix = base.get_vocab()["▁"]
    assert len(vocabulary.subpieces) > 10_000
    assert all(ids and prefix not in ids for ids in vocabulary.subpieces)


@pytest.fixture(scope="module")
def llama2_and_merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    data = REPO.parent / "shared/data/tokenizers"
    if not data.is_dir():
        pytest.skip(f"no real data at {data}")
    base = data / "llama2/tokenizer.model"
    pieces = (data / "chinese_sp/chinese_sp.model").read_bytes()
    folder = tmp_path_factory.mktemp("llama2")
    save_tokenizer(merge_clean(base.read_bytes(), pieces).model_bytes, folder)
    return base, folder


def test_normal_is_seeded_and_scaled(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), False, torch.float32, "1GB")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        resize_model(source, base, new, tmp_path / name, init="normal", seed=seed)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    start, stop = vocab_size(base), vocab_size(new) - 1
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    assert torch.equal(a[embed], b[embed])
    assert not torch.equal(a[embed], c[embed])
    noise = [
        t[start:stop] - tensors(source)[n].mean(0) for n, t in ((embed, a[embed]), (head, a[head]))
    ]
    assert noise[0].std().item() == pytest.approx(32**-0.5, rel=0.15)
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)


def test_tied_model_that_stores_both_matrices_keeps_them_equal(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), True, torch.float32, "1GB")
    values = tensors(source)
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, source / "model.safetensors", metadata={"format": "pt"})
    result = resize_model(source, base, new, tmp_path / "out", init="normal", seed=3)
    out = tensors(tmp_path / "out")
    assert result.tied
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


def test_padded_rows_of_the_base_are_used_up_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    size = vocab_size(base)
    source = save_model(tmp_path / "m", size + 20, False, torch.float32, "1GB")
    result = resize_model(source, base, new, tmp_path / "out", init="mean")
    matrix = tensors(tmp_path / "out")["lm_head.weight"]
    expected = mean_row(tensors(source)["lm_head.weight"], size).float()  # padding left out
    assert result.kept_rows == size
    assert torch.equal(matrix[size], expected)


def test_never_fewer_rows_than_before(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", 512, False, torch.float32, "1GB")
    assert resize_model(source, base, new, tmp_path / "out").embedding_rows == 512


def test_new_rows_do_not_depend_on_what_else_is_there() -> None:
    base = torch.arange(12.0).view(6, 2)
    from trainer.models.new_rows import Vocabulary

    vocabulary = Vocabulary(4, [[0, 2], [], [3]])
    rows = torch.cat(list(iterate_new_rows(base, vocabulary, 8, "subpiece_mean", 0)))
    mean = base[:4].mean(0)
    expected = torch.stack([base[[0, 2]].mean(0), mean, base[3], mean])
    assert torch.equal(rows, expected)


def test_mismatch_is_refused_with_both_sizes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    size = vocab_size(base)
    small = save_model(tmp_path / "small", size - 1, False, torch.float32, "1GB")
    with pytest.raises(ConfigError, match=rf"has {size} ids, but .* has {size - 1} embedding rows"):
        resize_model(small, base, new, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source = save_model(tmp_path / "m", size, False, torch.float32, "1GB")
    with pytest.raises(ConfigError, match=rf"\({size} ids\) does not extend|fewer than the model"):
        resize_model(source, new, base, tmp_path / "out2")


def test_tokenizer_that_renumbers_ids_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    other = json.loads(load_tokenizer(base).backend_tokenizer.to_str())
    vocab = other["model"]["vocab"]
    vocab["t"], vocab["h"] = vocab["h"], vocab["t"]
    folder = tmp_path / "other"
    load_tokenizer(base).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"id \d+ is '[th]' there and '[th]' here"):
        relate_vocabularies(load_tokenizer(base), load_tokenizer(folder))


def test_added_tokens_get_the_mean(pair: tuple[Path, Path]) -> None:
    base, new = pair
    tokenizer = load_tokenizer(new)
    tokenizer.add_tokens([AddedToken("<|call|>", special=True)])
    assert relate_vocabularies(load_tokenizer(base), tokenizer).subpieces[-1] == []


def test_incomplete_or_foreign_folders_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = pair
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors"):
        resize_model(tmp_path, base, new, tmp_path / "out")
    source = save_model(tmp_path / "m", vocab_size(base), False, torch.float32, "20KB")
    victim = sorted(source.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigError, match=f"lacks {victim.name}"):
        resize_model(source, base, new, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    whole = save_model(tmp_path / "n", vocab_size(base), False, torch.float32, "1GB")
    with pytest.raises(ConfigError, match="exists"):
        resize_model(whole, base, new, tmp_path / "taken")
    quantised = {**tensors(whole)}
    quantised["lm_head.weight"] = quantised["lm_head.weight"].to(torch.int8)
    save_file(quantised, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lm_head\.weight is stored as I8"):
        resize_model(whole, base, new, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_is_a_storage_error_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), False, torch.float32, "1GB")
    program = (
        "import resource, sys\n"
        "from trainer.models.resize import resize_model\n"
        "from trainer.errors import StorageError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))\n"
        "try: resize_model(*sys.argv[1:5])\n"
        "except StorageError as error: print('STORAGE', error)\n"
    )
    arguments = [str(p) for p in (source, base, new, tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=REPO,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "STORAGE" in done.stdout
    assert "nothing was left behind" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_unwritable_folder_is_a_storage_error(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), False, torch.float32, "1GB")

    def refuse(path: Path, parents: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    with pytest.raises(StorageError, match="Permission denied"):
        resize_model(source, base, new, tmp_path / "out")


def test_other_files_come_along_but_not_the_old_tokenizer(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, new = pair
    source = save_model(tmp_path / "m", vocab_size(base), False, torch.float32, "1GB")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "README.md").write_text("card")
    resize_model(source, base, new, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "kuroshio.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (new / "tokenizer.json").read_bytes()
    manifest = json.loads((tmp_path / "out/kuroshio.json").read_text())
    assert manifest["resize"]["real_rows"] == manifest["vocab_size"] == vocab_size(new)
    assert manifest["tokenizer_fingerprint"] == fingerprint(new)
