"""What the benchmarks of whole runs start from: a tokenizer, prepared samples, a 58 M LLaMA."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LLAMA2 = ROOT.parent / "shared" / "data" / "tokenizers" / "llama2" / "tokenizer.model"
NUM_ROWS = 32000
# 25.3 M parameters in the layers and 32.8 M in the two vocabulary matrices of 32,000 rows.
ARCHITECTURE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def find_tokenizer(given: Path | None, folder: Path) -> Path:
    """Return the given tokenizer, else LLaMA-2's beside the checkout, else one made in ``folder``.

    The one made has 32,000 ids as well, of which text uses the 256 bytes: what it costs a training
    step is the same, what it costs to load is less.
    """
    if given is not None:
        return given
    if LLAMA2.is_file():
        return LLAMA2
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *letters]
    names += [f"<unused_{i}>" for i in range(NUM_ROWS - len(names))]
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def overrides(tokenizer: Path, folder: Path) -> list[str]:
    """Return ``kuroshio run``'s overrides that train the model on the project's own samples."""
    samples = {name: ROOT / f"samples/{name}.jsonl" for name in ("zh_tw", "en")}
    return [
        "data=samples",
        *(f"data.sources.{name}.paths=['{path}']" for name, path in samples.items()),
        f"data.store_dir='{folder / 'store'}'",
        "tokenizer=file",
        f"tokenizer.path='{tokenizer}'",
        *(f"model.architecture.{key}={value}" for key, value in ARCHITECTURE.items()),
        "loop.eval_chars=0",
    ]


def place_of_ranks(num_ranks: int) -> dict[str, str]:
    """Return the environment that ranks of one machine share: addresses and threads."""
    from launch.local import threads_per_rank
    from launch.rendezvous import free_port

    threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_rank(num_ranks)))
    place = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    return place | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": threads}
