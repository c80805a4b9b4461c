"""Settings of pools, models, targets and imported files, as a user writes them in the YAML.

Here: fields with their units and defaults. Nothing here opens a file. Relative local paths are resolved against the
folder of the YAML, which the caller passes as pydantic's validation context:
`PoolSettings.model_validate(data, context={"base": folder})`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from resources.model_locations import HF_HUB, LOCAL_DIR

NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"


def available_cores() -> int:
    """Return the number of cores that this process may use; in a container it is smaller than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _resolve(path: str, info: ValidationInfo) -> str:
    if not path.strip():
        raise ValueError("the path is empty")
    if "://" in path:
        return path
    base = Path((info.context or {}).get("base", "."))
    return os.path.abspath(base / Path(path).expanduser())


Location = Annotated[str, AfterValidator(_resolve)]


def _resolve_local_dir(model: str, info: ValidationInfo) -> str:
    if not model.startswith(LOCAL_DIR):
        return model
    return LOCAL_DIR + _resolve(model.removeprefix(LOCAL_DIR), info)


def _resolve_weights_file(pretrained: str, info: ValidationInfo) -> str:
    """Resolve a path; a tag, which has neither a slash nor a file suffix, stays as it is."""
    if "/" in pretrained or pretrained.endswith((".pt", ".pth", ".bin", ".safetensors")):
        return _resolve(pretrained, info)
    return pretrained


ModelName = Annotated[str, StringConstraints(min_length=1), AfterValidator(_resolve_local_dir)]
Pretrained = Annotated[str, StringConstraints(min_length=1), AfterValidator(_resolve_weights_file)]


SubsetKey = Annotated[str, StringConstraints(pattern=r"^subset/[A-Za-z_][A-Za-z0-9_]*$")]


def recipe_of(subset: str | None) -> str | None:
    """Return the recipe of a subset that settings name as `subset/<recipe>`."""
    return subset.removeprefix("subset/") if subset is not None else None


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def check_templates(templates: Sequence[str]) -> None:
    """Check that every caption of a class has one place for its name.

    Raises:
        ValueError: one has not, or has other fields in braces.
    """
    for template in templates:
        try:
            placed = template.format("name") != template.format("other")
        except (IndexError, KeyError, ValueError, AttributeError):
            placed = False
        if "{}" not in template or not placed:
            raise ValueError(
                f"templates: {template!r} has no {{}}, or other braces. Remedy: one {{}}, for the class name"
            )


FormatName = Literal["webdataset", "datacomp", "parquet_images", "image_folder"]
"""Names of the formats in `resources.pools.formats`; a test compares the two."""


class PoolColumns(Settings):
    """Names of columns in a pool's Parquet files or caption tables, where they differ from the usual names."""

    image: str | None = Field(
        default=None,
        description="parquet_images: column with the images. image_folder: column with the file's name in a table.",
    )
    caption: str | None = Field(default=None, description="Column with the captions.")
    uid: str | None = Field(default=None, description="Column with uids of 32 hexadecimal digits.")
    url: str | None = Field(default=None, description="Column with URLs.")
    key: str | None = Field(default=None, description="parquet_images: column with keys. Default: the row's number.")


class PoolSettings(Settings):
    """Location and format of the raw pool, and limits on its samples."""

    path: Location = Field(description="Folder of the pool: local, or any fsspec URL such as s3://bucket/pool.")
    format: FormatName = Field(
        default="webdataset",
        description="webdataset: *.tar with an optional *.parquet of the same stem (img2dataset). datacomp: metadata "
        "with embeddings and no images (DataComp, dataset2metadata, clip-retrieval). parquet_images: *.parquet with "
        "image bytes in a column. image_folder: image files with captions in .txt files or a table.",
    )
    columns: PoolColumns | None = Field(
        default=None, description="parquet_images and image_folder: names of columns, where they are not found."
    )
    buckets: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="image_folder: shards that each folder's files are divided into, by a hash of the file's name. "
        "Default: one shard for each folder.",
    )
    tars_per_shard: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="webdataset: consecutive tars that are one shard, for pools of more than about 10,000 tars. It "
        "applies to new tars; a group never changes. Default: 1.",
    )
    min_side: int = Field(
        default=16,
        ge=1,
        description="Pixels. An image whose smaller side is below this is rejected "
        "(image_too_small). The default rejects tracking pixels and bullets, and keeps icons.",
    )
    max_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=89_478_485,
        description="Width times height. A larger image is rejected before decoding (image_bomb). "
        "Pillow warns above 89,478,485.",
    )
    max_caption_chars: int | None = Field(
        default=None,
        ge=1,
        description="Characters. A longer caption is rejected (caption_too_long). Default: no "
        "limit; the tokenizer cuts at its context length.",
    )


class PrecomputedKeys(Settings):
    """Names of one encoder's two arrays in the pool's npz."""

    image: str = Field(min_length=1, description="Name of the image embeddings' array.")
    text: str = Field(min_length=1, description="Name of the text embeddings' array.")


class EncoderSettings(Settings):
    """One CLIP encoder: a model to run, embeddings that the pool carries, or both."""

    model: ModelName | None = Field(
        default=None,
        description="open_clip model name (ViT-L-14), hub id (hf-hub:apple/DFN-public) or folder "
        "(local-dir:<path> with open_clip_config.json and open_clip_model.safetensors).",
    )
    pretrained: Pretrained | None = Field(
        default=None,
        description="open_clip pretrained tag (openai) or a weights file; only for a model name.",
    )
    precomputed: str | PrecomputedKeys | None = Field(
        default=None,
        description="Embeddings that the pool carries: a prefix (b32, l14), or {image: key, text: "
        "key}. A model given as well is used for targets and temperature.",
    )
    precision: Literal["fp32", "bf16", "fp16", "amp_bf16", "amp_fp16"] = Field(
        default="fp32",
        description="Number format of the model. bf16 and fp16: weights in half precision, layer norms in "
        "single. amp_bf16 and amp_fp16: weights in single, products in half. Part of the provenance.",
    )
    decode: Literal["exact", "draft"] = Field(
        default="exact",
        description="exact: all pixels, as open_clip's own preprocessing. draft: a JPEG of at least twice the model's "
        "input is decoded at a half, a quarter or an eighth of its size. Part of the provenance.",
    )
    batch_size: int = Field(
        default=64,
        ge=1,
        description="Samples per forward pass. Halved, repeatedly if needed, when the memory does not hold them.",
    )
    channels_last: bool | None = Field(
        default=None,
        description="Memory format of the image tower. Default: channels last if it has more than one convolution.",
    )
    compile: bool = Field(
        default=False,
        description="Whether to compile the model with torch.compile, which takes a minute and a C++ compiler.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (CUDA if available, else CPU), cpu, cuda or cuda:<index>.",
    )
    workers: int = Field(
        default_factory=available_cores,
        ge=0,
        description="Processes that decode images; 0 decodes in the main process. Default: one per core.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0.001,
        le=10,
        description="τ of negCLIPLoss. Default: the model's own, 1/exp(logit_scale). Required for "
        "precomputed embeddings without a model.",
    )
    of: SubsetKey | None = Field(
        default=None,
        description="The subset whose rows are embedded, as subset/<recipe>. Default: the whole pool.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "EncoderSettings":
        if self.model is None and self.precomputed is None:
            raise ValueError("give `model`, or `precomputed` for embeddings that the pool carries")
        if self.model is None and self.pretrained is not None:
            raise ValueError("`pretrained` needs `model`")
        if self.model is None and self.temperature is None:
            raise ValueError(
                "`precomputed` without `model` needs `temperature`, because there is no logit scale "
                "to take it from (0.01 for OpenAI's encoders)"
            )
        if self.model is not None and self.model.startswith((LOCAL_DIR, HF_HUB)) and self.pretrained is not None:
            raise ValueError("`pretrained` is for model names only: this model brings its weights")
        if self.of is not None and self.precomputed is not None:
            raise ValueError(
                "`of` saves the work of a model, and `precomputed` embeddings are only read. Remedy: leave `of` out"
            )
        return self

    @property
    def recipe(self) -> str | None:
        """The recipe whose subset is embedded."""
        return recipe_of(self.of)


class TargetFeatures(Settings):
    """Ready-made image embeddings of a target by one encoder."""

    files: list[Location] = Field(
        min_length=1,
        description=".npy, .npz or .pt files, in this order; a pattern such as in1k_*.pt stands for "
        "several, sorted by name.",
    )
    key: str | None = Field(
        default=None,
        description="Name of the array in .npz or .pt files (image_features). Default: the only "
        "array, or image_features.",
    )


class TargetSettings(Settings):
    """A downstream task's images, or their ready-made features by encoder."""

    path: Location | None = Field(
        default=None,
        description="Folder of class folders, a tar of the same, a webdataset tar, or a folder of webdataset tars.",
    )
    features: dict[str, TargetFeatures] = Field(
        default_factory=dict,
        description="Encoder name to file, pattern, list of those, or {files: …, key: …}.",
    )
    max_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=89_478_485,
        description="Width times height. A larger image is skipped before decoding.",
    )

    @field_validator("features", mode="before")
    @classmethod
    def _spell_out(cls, features: object) -> object:
        """Accept a file or a list of files in place of {files: [...]}."""
        if not isinstance(features, dict):
            return features
        spelled = {}
        for name, value in features.items():
            if isinstance(value, str):
                value = [value]
            if isinstance(value, list):
                value = {"files": value}
            elif isinstance(value, dict) and isinstance(value.get("files"), str):
                value = {**value, "files": [value["files"]]}
            spelled[name] = value
        return spelled

    @model_validator(mode="after")
    def _something(self) -> "TargetSettings":
        if self.path is None and not self.features:
            raise ValueError("give `path` to images, or `features` for an encoder")
        return self


class ExternalSettings(Settings):
    """Imported files with one row per uid."""

    files: tuple[Location, ...] = Field(
        min_length=1,
        description=".parquet, .csv, .npy (a structured array with f0 and f1) or, for uids alone, .txt (one per line): "
        "a file, a pattern such as dfn_*.parquet, a folder, or a list of those.",
    )
    uid: str = Field(
        default="uid",
        min_length=1,
        description="Column with uids as text. Files without it may have f0 and f1, as unsigned 64-bit numbers.",
    )
    minimum_coverage: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Smallest fraction of the pool's rows that must be in the files. Below it the files are refused, "
        "and a shard below it causes a warning.",
    )

    @field_validator("files", mode="before")
    @classmethod
    def _spell_out(cls, files: object) -> object:
        """Accept one file in place of a list."""
        return [files] if isinstance(files, str) else files


class HypeSettings(Settings):
    """HYPE from imported hyperbolic embeddings (arXiv 2404.17507; `docs/methods/hype.md`)."""

    path: Location = Field(
        description="Folder with <shard>.npz: spatial parts of image and text [n, d], one row per sample of the shard "
        "in its order, or joined by arrays f0 and f1, or uid.",
    )
    curvature: float = Field(gt=0, description="c of the encoder's space, whose curvature is -c.")
    reference: Location = Field(description=".npz with the same two arrays of the reference set, of any lengths.")
    image: str = Field(default="image", min_length=1, description="Name of the images' array.")
    text: str = Field(default="text", min_length=1, description="Name of the captions' array.")
    apex_radius: float = Field(
        default=0.1, gt=0, description="K: smallest distance from the origin at which entailment cones are defined."
    )
    clusters: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*/[A-Za-z_][A-Za-z0-9_]*$",
        description="<encoder>/<target> of scores.clusters: the cluster term is whether an image is in one of the "
        "target's clusters. Default: no cluster term.",
    )


class ExternalUids(ExternalSettings):
    """An imported uid list."""


class ExternalScores(ExternalSettings):
    """Imported scores."""

    columns: dict[Annotated[str, StringConstraints(pattern=NAME_PATTERN)], str] = Field(
        min_length=1,
        description="Columns to read: a name, a list of names, or a mapping of the name in recipes to the column's "
        "name in the files. Recipes that rank by a column take larger as better.",
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _name_columns(cls, columns: object) -> object:
        """Accept names in place of a mapping."""
        if isinstance(columns, str):
            columns = [columns]
        if isinstance(columns, list):
            return {str(name): name for name in columns}
        return columns

    @field_validator("columns")
    @classmethod
    def _names_are_free(cls, columns: dict[str, str]) -> dict[str, str]:
        taken = {"shard", "uid", "f0", "f1", "filename", "file_row_number"}
        for name in columns:
            if name.casefold() in taken:
                raise ValueError(f"{name!r} is the name of another column. Remedy: a mapping, such as {{mine: {name}}}")
            taken.add(name.casefold())
        return columns


BLIP_PROMPT = "a picture of "


class CaptionerSettings(Settings):
    """One captioner, for SIEVE (arXiv 2310.02110); the defaults of sampling are the paper's."""

    library: Literal["open_clip", "transformers"] = Field(
        default="open_clip",
        description="open_clip: the model is a CoCa. transformers: it is a BLIP, the paper's captioner, and needs the "
        "extra `blip`. It cannot be inferred, because a name or a folder may be either.",
    )
    model: ModelName = Field(
        description="open_clip's name of a CoCa (coca_ViT-L-14), hub id (hf-hub:...) or folder (local-dir:<path>). Of "
        "a BLIP the hub id as it stands (Salesforce/blip-image-captioning-base), or the folder that transformers' "
        "save_pretrained wrote for model and processor (local-dir:<path>)."
    )
    pretrained: Pretrained | None = Field(
        default=None,
        description="open_clip pretrained tag (mscoco_finetuned_laion2b_s13b_b90k) or a weights file; only for a "
        "CoCa's name.",
    )
    of: SubsetKey | None = Field(
        default=None,
        description="The subset whose images get captions, as subset/<recipe>. Default: the whole pool.",
    )
    prompt: str | None = Field(
        default=None,
        description="Text that every caption starts with; it is cut off afterwards. Default: 'a picture of ' for a "
        "BLIP, as in the published code, and none for a CoCa. Its tokens and the start token count as part of "
        "min_tokens and max_tokens; without a prompt neither counts.",
    )
    captions: int = Field(default=8, ge=1, description="Captions per image.")
    top_p: float = Field(default=0.9, gt=0, le=1, description="Probability mass of the nucleus.")
    min_tokens: int = Field(default=5, ge=0, description="Smallest number of tokens in a caption.")
    max_tokens: int = Field(default=20, ge=1, description="Largest number of tokens in a caption.")
    repetition_penalty: float = Field(
        default=1.1, ge=1, description="Factor that lowers the logits of tokens generated before."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the sampling, together with the uid.")
    precision: Literal["fp32", "bf16", "fp16", "amp_bf16", "amp_fp16"] = Field(
        default="fp32",
        description="Number format of the model, as for an encoder; but bf16 and fp16 are for a BLIP only, and apply "
        "to all of its weights, including layer norms. Part of the provenance.",
    )
    decode: Literal["exact", "draft"] = Field(default="exact", description="As for an encoder.")
    batch_size: int = Field(default=32, ge=1, description="Images per forward pass, each with all of its captions.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (CUDA if available, else CPU), cpu, cuda or cuda:<index>.",
    )
    workers: int = Field(default_factory=available_cores, ge=0, description="Processes that decode images.")

    @model_validator(mode="after")
    def _fits_the_library(self) -> "CaptionerSettings":
        if self.library == "transformers":
            if self.pretrained is not None:
                raise ValueError(
                    "`pretrained` is for the name of a CoCa: a BLIP brings its weights. Remedy: leave it out"
                )
            if self.model.startswith(HF_HUB):
                plain = self.model.removeprefix(HF_HUB)
                raise ValueError(f"{HF_HUB} is open_clip's. Remedy: the hub id as it stands, `model: {plain}`")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> "CaptionerSettings":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self

    @property
    def first_words(self) -> str:
        """The prompt; empty for none."""
        if self.prompt is None:
            return BLIP_PROMPT if self.library == "transformers" else ""
        return self.prompt.strip() and self.prompt

    @property
    def recipe(self) -> str | None:
        """The recipe whose subset gets captions."""
        return recipe_of(self.of)


class TextEncoderSettings(Settings):
    """A text encoder for masked captions in SIEVE: a sentence-transformers model, or the text tower of an encoder."""

    model: ModelName | None = Field(
        default=None,
        description="sentence-transformers model: hub id (sentence-transformers/all-MiniLM-L6-v2, the paper's) or "
        "folder (local-dir:<path>). Needs the extra `sieve`.",
    )
    encoder: str | None = Field(
        default=None, description="Name of an encoder of the project, whose text tower is used."
    )
    batch_size: int = Field(default=256, ge=1, description="Texts per forward pass.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Of a `model`: auto (CUDA if available, else CPU), cpu, cuda or cuda:<index>.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> "TextEncoderSettings":
        if (self.model is None) == (self.encoder is None):
            raise ValueError("give either `model` or `encoder`")
        return self
