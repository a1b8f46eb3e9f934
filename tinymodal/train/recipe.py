"""What a training run is: the parts, and the stages one after the other. A plain value, no torch.

Read by ``core.config.load(path, Recipe)``; every key, its unit and its default stand here and nowhere else.
Paths are relative to the working directory.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from tinymodal.compose.spec import ModelSpec
from tinymodal.core.lookup import nearest

Group = Literal["vision", "connectors", "language", "embeddings", "adapters", "heads"]
GROUPS: tuple[Group, ...] = ("vision", "connectors", "language", "embeddings", "adapters", "heads")
PARTS = ("vision", "connectors", "language")
"""Groups that are rooms of the model: of these a stage may train less than all, or adapters instead."""
Loss = Literal["text", "cells"]

# Strict scalars: "10" is not 10 and true is not 1. Whole numbers are welcome where a float is asked for.
Count = Annotated[int, Strict(), Field(gt=0)]
Natural = Annotated[int, Strict(), Field(ge=0)]
Rate = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1)]
Flag = Annotated[bool, Strict()]


class Value(BaseModel):
    """Frozen, and no key that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Value):
    """Where rows come from: files by ``path`` and ``format``, or made ones by ``made`` and ``options``."""

    path: str | None = None
    """A file or a glob of .json, .jsonl or .parquet."""
    format: str | None = None
    """``llava``, ``messages``, ``caption``, ``vqa``, or your own ``my_rows.py:convert``."""
    images: str | None = None
    """Folder that relative picture paths are looked up in, after the data file's own folder: first
    by the whole path, then by the file name alone."""
    made: str | None = None
    """Name of a generator in ``tinymodal.data.synthetic.MADE``, or your own ``my_data.py:Make``."""
    options: dict[str, Any] = {}
    """Keyword arguments of the generator."""
    weight: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of samples relative to the other sources of the stage."""

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.made is None):
            both = "both" if self.path else "neither"
            raise ValueError(f"a source has either 'path' or 'made', found {both}")
        if self.path is not None and self.format is None:
            raise ValueError("'path' needs 'format': llava, messages, caption, vqa or my_rows.py:convert")
        if self.path is not None and self.options:
            raise ValueError("'options' are for 'made' sources; this one has 'path'")
        if self.made is not None and (self.format is not None or self.images is not None):
            raise ValueError("'format' and 'images' are for 'path' sources; this one is 'made'")
        return self


class Choice(NamedTuple):
    """Which of a group's parameters train."""

    layer: int | None = None
    """This block and all behind it, counted from 0."""
    norms: bool = False
    """The weights of its norms."""
    biases: bool = False
    """The biases of its norms as well."""
    names: tuple[str, ...] = ()
    """Its modules, or single parameters, of these names."""


CHOICES = "'from layer K', 'norms', 'norms with biases' or 'named X, Y'"


def read_choice(text: str) -> Choice:
    """What a value of ``only`` means.

    Raises:
        ValueError: it means nothing.
    """
    if match := re.fullmatch(r"from layer (\d+)", text):
        return Choice(layer=int(match[1]))
    if text in ("norms", "norms with biases"):
        return Choice(norms=True, biases=text != "norms")
    if match := re.fullmatch(r"named ([\w.]+(?:, *[\w.]+)*)", text):
        return Choice(names=tuple(re.split(r", *", match[1])))
    raise ValueError(f"'{text}' chooses nothing; take {CHOICES}")


class Lora(Value):
    """Small matrices that train in place of the large ones beside which they stand."""

    rank: Count
    """Columns of one small matrix and rows of the other."""
    alpha: Count | None = None
    """The adapter counts alpha / rank (``rslora``: alpha / root of rank); None: twice the rank."""
    dropout: Fraction = 0.05
    """Fraction of an adapter's inputs that is left out at random while it trains."""
    parts: tuple[str, ...] = ("language",)
    """Where they stand: any of ``vision``, ``connectors``, ``language``. Never on the language head."""
    targets: str | tuple[str, ...] = "linear"
    """``linear``: every linear layer of the parts; or the layers' own names: ``["q_proj", "v_proj"]``."""
    kind: Literal["lora", "dora", "rslora"] = "lora"
    """``dora`` learns the length of every row as well; ``rslora`` keeps large ranks from counting less."""

    @field_validator("parts")
    @classmethod
    def _parts(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        if not parts:
            raise ValueError("is empty; give at least one, e.g. ['language']")
        for part in parts:
            if part not in PARTS:
                raise ValueError(f"unknown part '{part}'; parts: {', '.join(PARTS)}{nearest(part, PARTS)}")
        return parts

    @field_validator("targets")
    @classmethod
    def _targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError("is empty; take 'linear' for every linear layer")
        if isinstance(targets, str) and targets != "linear":
            raise ValueError(f"'{targets}' is not 'linear'; names stand in a list: ['{targets}']")
        return targets

    @field_validator("dropout")
    @classmethod
    def _dropout(cls, dropout: float) -> float:
        if dropout == 1:
            raise ValueError("1 leaves every input out; take less")
        return dropout


class Stage(Value):
    """What trains, on what, for how long."""

    name: str
    """Names the folder ``run/stages/<name>``: letters, digits, ``-`` and ``_``."""
    train: dict[str, Rate]
    """Group -> peak learning rate; what is not listed, or has rate 0, is frozen. Groups: vision, connectors
    (with the learned marks), language (the decoder, and its embeddings unless they are listed or ``only``
    names language), embeddings (token embeddings and language head), adapters (of ``lora``), heads (the cell
    heads)."""
    only: dict[str, str] = {}
    """Group -> what of it trains, where that is not all of it: ``from layer 12`` (that block, counted from 0,
    and the ones behind it), ``norms`` (their weights), ``norms with biases``, ``named proj, query`` (modules
    or parameters of these names). For vision, connectors and language."""
    lora: Lora | None = None
    """Adapters, with the rate ``train.adapters``: ``{ rank = 64 }``. Merged when the stage ends."""
    bits: Literal[4, 8] | None = None
    """What the language model's linear layers are stored in while adapters on them train; None: 32."""
    data: tuple[Source, ...]
    """Where samples come from; several sources are mixed by ``weight``."""
    steps: Count
    """Optimizer steps."""

    seq_len: Count = 2048
    """Positions in a row; samples are packed into rows and never cut, a longer one is dropped and counted."""
    batch_tokens: Count = 16_384
    """Positions per optimizer step; a multiple of ``seq_len``."""
    micro_batch_tokens: Count | None = None
    """Positions that run at once, for memory; None: the whole batch. The gradient is the same."""
    patches: Count | None = None
    """Image patches in a row at most, the packer's second budget; None: no limit."""
    template: str | None = None
    """Chat template of this stage, e.g. ``plain`` for captions; None: the model's own."""
    train_on: Literal["answers", "all"] = "answers"
    """``all``: every word trains, questions too; for teaching a new language model its language."""

    loss: tuple[Loss, ...] = ("text",)
    """``text``: next token where a label is. ``cells``: what each image token shows (made data only)."""
    cell_classes: tuple[Count, ...] = ()
    """Number of classes of each cell head, in the order of ``Image.targets``; ``cells`` only."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Rate over the stage: rise, then a half cosine; rise, hold, fall; or rise, hold."""
    warmup: Fraction = 0.03
    """Fraction of the steps spent rising from 0 to the peak."""
    decay: Fraction = 0.2
    """Fraction of the steps spent falling, ``wsd`` only."""
    floor: Fraction = 0.1
    """Factor at the last step, relative to the peak; ``cosine`` and ``wsd``."""
    weight_decay: Rate = 0.0
    """AdamW's, on matrices only: norms, biases and embeddings never decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's, of the mean and of the mean square of the gradient."""
    clip: Rate = 1.0
    """Norm that the gradient is cut to; 0: never cut."""

    bad_rows: Literal["raise", "skip"] = "raise"
    """``skip``: a row that cannot be read is left out, counted, and listed in ``run/skipped.jsonl``."""
    workers: Natural = 0
    """Processes that read and encode samples; 0: this one. The batches are the same."""
    seed: Natural | None = None
    """None: the recipe's seed plus the stage's number."""
    recompute: Flag = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"'{name}' names a folder; use letters, digits, '-' and '_'")
        return name

    @field_validator("train")
    @classmethod
    def _train(cls, train: dict[str, float]) -> dict[str, float]:
        for group in train:
            if group not in GROUPS:
                hint = nearest(group, GROUPS)
                raise ValueError(f"unknown group '{group}'; groups: {', '.join(GROUPS)}{hint}")
        if not any(train.values()):
            raise ValueError(
                "the stage trains nothing; give a group a rate above 0, e.g. {connectors = 1e-3}"
            )
        return train

    @field_validator("only")
    @classmethod
    def _only(cls, only: dict[str, str]) -> dict[str, str]:
        for group, text in only.items():
            if group not in PARTS:
                hint = nearest(group, PARTS)
                raise ValueError(
                    f"'{group}' trains as a whole; groups that need not: {', '.join(PARTS)}{hint}"
                )
            try:
                read_choice(text)
            except ValueError as error:
                raise ValueError(f"{group}: {error}") from None
        return only

    @field_validator("data", "loss")
    @classmethod
    def _some(cls, value: tuple) -> tuple:
        if not value:
            raise ValueError("is empty; give at least one")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Stage:
        if self.batch_tokens % self.seq_len:
            down = self.batch_tokens // self.seq_len * self.seq_len
            near = f"{down} or {down + self.seq_len}" if down else str(self.seq_len)
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of seq_len {self.seq_len}; take {near}"
            )
        micro = self.micro_batch_tokens
        if micro is not None and (micro % self.seq_len or self.batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens {micro} must be a multiple of seq_len {self.seq_len} "
                f"and divide batch_tokens {self.batch_tokens}"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup {self.warmup} + decay {self.decay} exceed the stage; together at most 1"
            )
        heads = self.train.get("heads", 0) > 0
        if "cells" in self.loss and not (heads and self.cell_classes):
            raise ValueError(
                "the cells loss needs 'cell_classes' (classes of each head) and a rate for 'train.heads'"
            )
        if "cells" not in self.loss and (self.train.get("heads") or self.cell_classes):
            raise ValueError(
                "'train.heads' and 'cell_classes' are for the cells loss; add it: loss = ['cells']"
            )
        idle = [f"train.{g}" for g in ("language", "embeddings") if self.train.get(g)]
        if self.lora is not None and "language" in self.lora.parts:
            idle.append("train.adapters")
        if self.loss == ("cells",) and idle:
            raise ValueError(f"'{idle[0]}' has a rate, but only the text loss trains it; add 'text' to loss")
        return self

    @model_validator(mode="after")
    def _choose(self) -> Stage:
        for group in self.only:
            if not self.train.get(group):
                raise ValueError(
                    f"'only.{group}' says what trains, but 'train.{group}' has no rate; give it one"
                )
        if self.lora is None and self.train.get("adapters"):
            raise ValueError("'train.adapters' has a rate, but there are none; add lora = { rank = 64 }")
        if self.lora is not None and not self.train.get("adapters"):
            raise ValueError("'lora' has no rate; add it to 'train', e.g. {adapters = 2e-4}")
        adapted = () if self.lora is None else self.lora.parts
        for group in adapted:
            if self.train.get(group) and group not in self.only:
                raise ValueError(
                    f"'train.{group}' trains the matrices that lora.parts keeps frozen below its adapters; "
                    f"take one of the two out, or name what else trains, e.g. only = {{{group} = 'norms'}}"
                )
        if self.bits is not None and self.train.get("language") and not self.choice("language").norms:
            raise ValueError(
                f"bits = {self.bits} stores the language model's matrices rounded, which cannot train; train "
                f"adapters in its place: train = {{adapters = 2e-4}}, lora = {{rank = 64}}"
            )
        if self.bits == 8 and self.lora is not None and self.lora.kind == "dora":
            # peft 0.21 loses the scales of 8 bits with DoRA's first product on a CPU.
            raise ValueError("bits = 8 does not go with kind = 'dora'; take bits = 4, or kind = 'lora'")
        if self.bits is not None and "language" not in adapted:
            raise ValueError(
                f"bits = {self.bits} is for adapters on the language model; add lora = {{rank = 64}}, or "
                f"take bits out"
            )
        return self

    def choice(self, group: str) -> Choice:
        """What of ``group`` trains; an empty choice: all of it."""
        return read_choice(self.only[group]) if group in self.only else Choice()

    @property
    def micro_batches(self) -> int:
        """Batches that one step reads."""
        return self.batch_tokens // (self.micro_batch_tokens or self.batch_tokens)


class Recipe(Value):
    """A run, complete on one screen."""

    name: str
    """What the run is called; the folder is ``runs/<name>`` unless another is given."""
    model: ModelSpec
    """What is trained: ``[model]``."""
    stages: tuple[Stage, ...]
    """What is done, one ``[[stages]]`` after the other."""
    seed: Natural = 0
    """Fixes random weights, the order of samples and dropout."""
    save_every: Natural = 200
    """Steps between two checkpoints; 0: only at the end of each stage. The newest two are kept."""
    threads: Count | None = None
    """Threads of torch; None: torch decides. On a busy small machine 1 is often fastest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the passes compute in (autocast); weights and optimizer stay float32. bfloat16 is for GPUs."""
    parts: dict[Literal["vision", "language"], str] = {}
    """Part -> folder that it is saved in alone, at the end of the run."""

    @field_validator("stages")
    @classmethod
    def _stages(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if not stages:
            raise ValueError("is empty; a recipe has at least one [[stages]]")
        names = [stage.name for stage in stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called '{name}'; each needs its own name")
        return stages

    @model_validator(mode="after")
    def _parts_exist(self) -> Recipe:
        if self.model.path is not None:
            return self
        for i, stage in enumerate(self.stages):
            for group in ("vision", "connectors"):
                if stage.train.get(group) and self.model.vision is None:
                    raise ValueError(
                        f"stages[{i}].train.{group} has a rate, but the model has no vision part; "
                        f"add [model] vision = {{ path = ... }} or remove the group"
                    )
                if stage.lora is not None and group in stage.lora.parts and self.model.vision is None:
                    raise ValueError(
                        f"stages[{i}].lora.parts names {group}, but the model has no vision part; "
                        f"add [model] vision = {{ path = ... }} or remove the part"
                    )
        if "vision" in self.parts and self.model.vision is None:
            raise ValueError("parts.vision is named, but the model has no vision part")
        return self

    def stage_seed(self, index: int) -> int:
        """Seed of stage ``index``."""
        own = self.stages[index].seed
        return self.seed + index if own is None else own
