"""Extend a vocabulary: pieces → merged tokenizer → resized model → audit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokenizer.audit import Candidate, Subject, TokenFlops, audit
from tokenizer.audit_page import render_page, summarise
from tokenizer.extension import Extended, Rules, extend_tokenizer
from tokenizer.load import fingerprint
from tokenizer.measure import Encoder
from tokenizer.pair import check_pair
from tokenizer.scripts import DEFAULT_SCRIPTS, SCRIPT_PATTERNS
from tokenizer.spm import truncate_model
from tokenizer.train import TextSample, train_pieces
from trainer.config import RunConfig, nearest
from trainer.data.reading.readers import list_files, read_documents
from trainer.data.reading.records import RejectLog
from trainer.errors import ConfigError, DataError
from trainer.models.aside import naming_full_disk, written_aside
from trainer.models.new_rows import Init
from trainer.models.outputs import Outputs, file_facts, read_json, to_json, write_text
from trainer.models.resize import model_bytes, resize_model
from trainer.plan.flops import ModelShape, flops_per_token
from trainer.stage import Context, Stage

CHECK_EVERY_DOCUMENTS = 1000  # between updates of the progress line


@dataclass
class Vocab(Stage):
    """Hyperparameters of the extension; their meaning is in ``conf/stage/vocab.yaml``."""

    name: ClassVar[str] = "vocab"
    single_process: ClassVar[bool] = True

    base_tokenizer: str | None = None
    pieces: str | None = None
    merge: Literal["clean", "compatible"] = "clean"
    vocab_size: int | list[int] | None = None
    model_type: Literal["bpe", "unigram"] = "bpe"
    character_coverage: float = 0.9995
    sample_chars: int = 20_000_000
    scripts: list[str] = field(default_factory=lambda: list(DEFAULT_SCRIPTS))
    dead_pieces: Literal["drop", "revive"] = "drop"
    extra_pieces: list[str] = field(default_factory=list)
    init: Init = "subpiece_mean"
    pad_to_multiple: int = 64
    audit_chars: int = 2_000_000
    audit_sentences: list[str] = field(default_factory=list)

    def check(self, config: RunConfig) -> list[str]:
        """Return what contradicts itself or the rest of the config."""
        problems = []
        if not (self.base_tokenizer or config.tokenizer.path or config.model.path):
            problems.append(
                "stage.base_tokenizer is null and there is no tokenizer.path or model.path; "
                "give the tokenizer to extend"
            )
        if self.pieces is None and not config.data.sources:
            problems.append(
                "stage.pieces is null and data.sources is empty; give a .model with pieces, or "
                "texts to train them on"
            )
        if self.pieces is None and not self.sizes:
            problems.append("stage.vocab_size is null; say how many pieces to train, e.g. 20000")
        for size in self.sizes:
            if size < 4:
                problems.append(f"stage.vocab_size={size}: expected 4 or more")
        for script in self.scripts:
            if script != "all" and script not in SCRIPT_PATTERNS:
                hint = nearest(script, [*SCRIPT_PATTERNS, "all"])
                problems.append(f"stage.scripts holds {script!r}, which is no script{hint}")
        if not 0.98 <= self.character_coverage <= 1:
            problems.append(
                f"stage.character_coverage={self.character_coverage}: expected 0.98 to 1"
            )
        for key in ("pad_to_multiple", "sample_chars", "audit_chars"):
            if vars(self)[key] < 1:
                problems.append(f"stage.{key}={vars(self)[key]}: expected 1 or more")
        return problems

    @property
    def sizes(self) -> list[int]:
        """Sizes to build; the first one is used, the others are points of the curve."""
        if self.vocab_size is None:
            return []
        return self.vocab_size if isinstance(self.vocab_size, list) else [self.vocab_size]

    def run(self, context: Context) -> None:
        """Do the whole stage, writing into ``context.run_dir``.

        Raises:
            ConfigError: contradictory or missing settings, or a run folder of other inputs.
            DataError: pieces, base or sources that cannot be used.
            StorageError: disk full or run folder not writable.
        """
        if problems := self.check(context.config):
            raise ConfigError("\n".join(problems))
        base = self._find_base(context.config)
        outputs = Outputs(context.run_dir, self._inputs(context.config, base))
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        if outputs.complete():
            console.print(f"{context.run_dir} is complete, its inputs unchanged: nothing to do")
            return
        columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description}", markup=False)
        with (
            naming_full_disk(context.run_dir),
            Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        ):
            outputs.begin()
            result = self._build(context, base, progress)
            outputs.commit()
        console.print(summarise(result))
        console.print(f"tokenizer: {context.run_dir / 'tokenizer'}")
        if context.config.model.path:
            console.print(f"model: {context.run_dir / 'model'}")
        console.print(f"audit: {context.run_dir / 'audit.html'}")

    def _build(self, context: Context, base: Path, progress: Progress) -> dict[str, Any]:
        """Write everything but the manifest; return the audit."""
        config, run_dir = context.config, context.run_dir
        token_flops = cost_model(config)
        training, sources = self._read_sources(context, progress)
        sizes: list[int | None] = [*self.sizes] or [None]
        built = [(size, self._extend(base, size, training, progress)) for size in sizes]
        size, chosen = built[0]
        with written_aside(run_dir / "tokenizer") as folder:
            chosen.save(folder)
        if config.model.path:
            self._resize(context, base, progress)
        task = progress.add_task("audit")
        subject = Subject(
            base=Encoder.load(base),
            new=Encoder.load(run_dir / "tokenizer"),
            scripts=tuple(self.scripts),
            dropped=chosen.dropped,
            intermediates=chosen.intermediates,
            num_pieces=size or 0,
            candidates=[Candidate(n or 0, other.encoder()) for n, other in built[1:]],
        )
        result = audit(
            subject,
            sources,
            self.audit_sentences,
            self.pad_to_multiple,
            token_flops,
            lambda name: progress.update(task, description=f"audit: {name}"),
        )
        write_text(run_dir / "audit.json", to_json(result))
        page = render_page(result, f"{config.name}: vocabulary", self._facts(config, base))
        write_text(run_dir / "audit.html", page)
        progress.update(task, total=1, completed=1, description="audit")
        return result

    def _find_base(self, config: RunConfig) -> Path:
        base = Path(self.base_tokenizer or config.tokenizer.path or str(config.model.path))
        if not base.exists():
            raise ConfigError(f"stage.base_tokenizer={base} does not exist; give a file or folder")
        if self.pieces and not Path(self.pieces).is_file():
            raise ConfigError(f"stage.pieces={self.pieces} is no file; give a SentencePiece .model")
        if config.model.path:
            check_pair(config.model.path, base)
        return base

    def _inputs(self, config: RunConfig, base: Path) -> dict[str, Any]:
        """Return what decides the result: settings, and the files behind them."""
        model_files = sorted(Path(config.model.path).glob("*")) if config.model.path else []
        return {
            "stage": asdict(self),
            "base_fingerprint": fingerprint(base),
            "pieces_fingerprint": fingerprint(self.pieces) if self.pieces else None,
            "sources": {
                name: {**asdict(source), "files": [file_facts(p) for p in list_files(source)]}
                for name, source in config.data.sources.items()
            },
            "model_files": [file_facts(path) for path in model_files if path.is_file()],
            "seed": config.loop.seed,
        }

    def _read_sources(
        self, context: Context, progress: Progress
    ) -> tuple[list[str], dict[str, list[str]]]:
        """Read every source once; return the texts to train on and those to audit, per source."""
        data, seed = context.config.data, context.config.loop.seed
        total = sum(source.weight for source in data.sources.values()) or 1.0
        training: list[str] = []
        audited: dict[str, list[str]] = {}
        for name, source in data.sources.items():
            task = progress.add_task(f"reading {name}")
            share = int(self.sample_chars * source.weight / total) if self.pieces is None else 0
            samples = TextSample(share, seed), TextSample(self.audit_chars, seed + 1)
            rejects = RejectLog(context.run_dir / f"rejects-{name}.jsonl", data.max_bad_row_share)
            for number, document in enumerate(read_documents(source, name, rejects), 1):
                for sample in samples:
                    sample.add(document.text)
                if number % CHECK_EVERY_DOCUMENTS == 0:
                    progress.update(task, description=f"reading {name}: {number:,} documents")
            done = f"read {name}: {rejects.num_accepted:,} documents"
            if rejects.num_rejected:
                done += f", {rejects.num_rejected:,} rows rejected, see {rejects.path}"
            progress.update(task, description=done)
            progress.update(task, total=1, completed=1)
            training += samples[0].texts()
            audited[name] = samples[1].texts()
        return training, audited

    def _extend(
        self, base: Path, size: int | None, training: list[str], progress: Progress
    ) -> Extended:
        """Train or take ``size`` pieces and merge them into the base."""
        task = progress.add_task(f"pieces: {size or 'all'}")
        if self.pieces is None:
            if size is None or not training:
                raise DataError("no text to train pieces on; give data.sources with some text")
            donor = train_pieces(
                training, size, self.model_type, self.scripts, self.character_coverage
            )
        else:
            donor = Path(self.pieces).read_bytes()
            if size is not None:
                donor = truncate_model(donor, size, f"stage.pieces={self.pieces}")
        rules = Rules(self.merge, self.scripts, self.dead_pieces, self.extra_pieces)
        extended = extend_tokenizer(base, donor, rules)
        progress.update(task, description=f"merged {len(extended.added):,} pieces")
        progress.update(task, total=1, completed=1)
        return extended

    def _resize(self, context: Context, base: Path, progress: Progress) -> None:
        """Write the resized model, with its tokenizer and the manifest that ties the two."""
        config, source = context.config, str(context.config.model.path)
        size_mb, written = model_bytes(source) / 1e6, 0
        task = progress.add_task(f"resizing {source}")

        def advance(num_bytes: int) -> None:
            nonlocal written
            written += num_bytes
            text = f"resizing {source}: {written / 1e6:,.0f} of about {size_mb:,.0f} MB"
            progress.update(task, description=text)

        resize_model(
            source,
            base,
            context.run_dir / "tokenizer",
            context.run_dir / "model",
            self.init,
            self.pad_to_multiple,
            config.loop.seed,
            advance,
        )
        progress.update(task, total=1, completed=1)

    def _facts(self, config: RunConfig, base: Path) -> dict[str, str]:
        """Return what the page says about the run."""
        pieces = self.pieces or f"{self.model_type}, trained on {', '.join(config.data.sources)}"
        facts = {"Base": str(base), "Pieces": pieces, "Merge": self.merge}
        if self.merge == "clean":
            facts["Merge"] += f"; {', '.join(self.scripts)}; dead pieces: {self.dead_pieces}"
        if config.model.path:
            facts["Model"] = f"{config.model.path}; new rows: {self.init}"
        length = config.data.max_length
        facts["Cost model"] = f"{config.model.name}, rows of {length:,} tokens"
        return facts


def cost_model(config: RunConfig) -> TokenFlops:
    """Return training FLOPs of one token (layers, head) as a function of the rows of the head."""
    values = config.model.architecture or {}
    if config.model.path:
        values = read_json(Path(config.model.path) / "config.json")

    def token_flops(rows: int) -> tuple[float, float]:
        shape = ModelShape.from_config({**values, "vocab_size": rows})
        flops = flops_per_token(shape, config.data.max_length)
        return flops.layers + flops.attention, flops.head

    token_flops(1)  # sizes that are missing are named before the work begins
    return token_flops
