"""Encoders return open_clip's embeddings, row for row, for any batch size, number of processes and memory."""

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image

from resources.models.decoding import ImageWork, Look, Prepare
from resources.models.encoders import Embeddings, Encoder, EncoderError, embed_together
from resources.pools.base import Pool
from resources.pools.formats import open_pool
from resources.settings import EncoderSettings, PoolSettings
from resources.storage import images
from tests.support.pool_factory import (
    SHARED,
    TINY_CONFIG,
    TINY_CONVOLUTIONAL_CONFIG,
    caption,
    datacomp_shard,
    picture,
    sample,
    unit_rows,
    webdataset_pool,
    write_clip,
    write_shard,
)

MODEL = SHARED / "data" / "models" / "flickr-small"


def encoder(folder: Path, **options: Any) -> Encoder:
    return Encoder(
        "tiny",
        EncoderSettings(**{"model": f"local-dir:{folder}", "workers": 0, "batch_size": 4, **options}),
    )


def tables(pool: Pool) -> dict[str, pa.Table]:
    return {name: pool.read_shard(name).rows for name in pool.list_shards()}


def reference(folder: Path, images: list[bytes], texts: list[str]) -> tuple[Any, Any]:
    """Embed with open_clip directly, one sample at a time."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        image = [model.encode_image(transform(Image.open(io.BytesIO(data)))[None])[0] for data in images]
        text = [model.encode_text(tokenizer([words]))[0] for words in texts]
    return tuple(np.stack([(v.double() / v.double().norm()).numpy() for v in rows]) for rows in (image, text))


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return open_pool(PoolSettings(path=str(webdataset_pool(tmp_path / "pool"))), {})


def test_loading_the_module_loads_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys, resources.models.encoders, resources.inputs.targets, resources.pools.webdataset, "
        "resources.pools.datacomp; print(sorted({'torch', 'open_clip'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_embeddings_are_open_clips_own_in_unit_norm(tiny_clip: Path, pool: Pool) -> None:
    ((_, first), (name, found)) = encoder(tiny_clip).embed_pool(tables(pool), pool)
    assert isinstance(first, Embeddings)
    assert isinstance(found, Embeddings)
    assert name == "00001"
    rows = range(6, 12)
    image, text = reference(tiny_clip, [picture(i) for i in rows], [caption(i) for i in rows])
    assert found.image.dtype == found.text.dtype == np.float16
    np.testing.assert_allclose(found.image, image, atol=5e-4)
    np.testing.assert_allclose(found.text, text, atol=5e-4)
    assert np.abs(np.linalg.norm(found.image.astype(np.float64), axis=1) - 1).max() < 2e-3


def test_the_text_of_a_class_is_the_mean_of_its_captions_in_unit_norm(tiny_clip: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    found = encoder(tiny_clip).loaded.class_texts(["dog", "sea_lion"], ["a photo of a {}.", "{}"])
    for row, name in zip(found.double(), ("dog", "sea lion"), strict=True):
        with torch.inference_mode():
            both = model.eval().encode_text(tokenizer([f"a photo of a {name}.", name]), normalize=True).double()
        mean = both.mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=0)
        assert float(row.norm()) == pytest.approx(1, abs=1e-6)


def test_any_batch_size_and_number_of_processes_gives_the_same_rows(tiny_clip: Path, pool: Pool) -> None:
    rows = tables(pool)
    runs = [
        list(encoder(tiny_clip, **options).embed_pool(rows, pool))
        for options in ({}, {"batch_size": 1}, {"batch_size": 5, "workers": 2})
    ]
    for run in runs:
        assert [name for name, _ in run] == ["00000", "00001"]
        for (_, one), (_, other) in zip(run, runs[0], strict=True):
            assert isinstance(one, Embeddings)
            assert isinstance(other, Embeddings)
            np.testing.assert_allclose(one.image, other.image, atol=5e-4)
            np.testing.assert_allclose(one.text, other.text, atol=5e-4)


def test_some_rows_of_a_shard_can_be_embedded_in_any_order(tiny_clip: Path, pool: Pool) -> None:
    rows = tables(pool)["00000"]
    ((_, whole),) = encoder(tiny_clip).embed_pool({"00000": rows}, pool)
    ((_, some),) = encoder(tiny_clip).embed_pool({"00000": rows.take([5, 0, 3])}, pool)
    ((_, none),) = encoder(tiny_clip).embed_pool({"00000": rows.slice(0, 0)}, pool)
    assert isinstance(whole, Embeddings)
    assert isinstance(some, Embeddings)
    assert isinstance(none, Embeddings)
    np.testing.assert_allclose(some.image, whole.image[[5, 0, 3]], atol=5e-4)
    assert none.image.shape == none.text.shape == (0, 16)


def test_a_table_is_asked_for_when_its_turn_comes(tiny_clip: Path, pool: Pool) -> None:
    asked: list[str] = []

    class Lazily(Mapping[str, pa.Table]):
        def __init__(self, whole: dict[str, pa.Table]) -> None:
            self.whole = whole

        def __getitem__(self, name: str) -> pa.Table:
            asked.append(name)
            return self.whole[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.whole)

        def __len__(self) -> int:
            return len(self.whole)

    done: list[int] = []
    found = encoder(tiny_clip).embed_pool(Lazily(tables(pool)), pool, on_rows=done.append)
    assert next(found)[0] == "00000"
    assert (asked, done) == (["00000"], [4, 2])
    assert next(found)[0] == "00001"
    assert (asked, done) == (["00000", "00001"], [4, 2, 4, 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changed_fails_alone_and_names_the_remedy(tiny_clip: Path, tmp_path: Path, workers: int) -> None:
    folder = webdataset_pool(tmp_path / "pool", shards=4)
    pool = open_pool(PoolSettings(path=str(folder)), {})
    rows = tables(pool)
    (folder / "00000.tar").unlink()
    write_shard(folder, [sample(6)], "00001")
    changed = bytearray((folder / "00002.tar").read_bytes())
    start = rows["00002"]["image_offset"][3].as_py()
    changed[start : start + 100] = b"x" * 100
    (folder / "00002.tar").write_bytes(changed)
    found = dict(encoder(tiny_clip, workers=workers).embed_pool(rows, pool))
    assert isinstance(found["00003"], Embeddings)
    for name, words in (
        ("00000", "00000.tar"),
        ("00001", "ends at byte"),
        ("00002", "key 000000015"),
    ):
        assert isinstance(found[name], EncoderError)
        assert words in str(found[name])
        assert "materialize raw_pool again" in str(found[name])


def test_processes_end_when_the_work_is_left_early(tiny_clip: Path, pool: Pool) -> None:
    found = encoder(tiny_clip, workers=2).embed_pool(tables(pool), pool)
    next(found)
    assert multiprocessing.active_children()
    found.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_processes_end_when_the_main_one_is_killed(tiny_clip: Path, tmp_path: Path) -> None:
    folder = webdataset_pool(tmp_path / "pool", shards=1)
    code = f"""
import multiprocessing, os, signal
from resources.models.encoders import Encoder
from resources.pools.formats import open_pool
from resources.settings import EncoderSettings, PoolSettings

def stop(rows):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    pool = open_pool(PoolSettings(path={str(folder)!r}), {{}})
    rows = pool.read_shard("00000").rows
    settings = EncoderSettings(model="local-dir:{tiny_clip}", workers=2, batch_size=1)
    list(Encoder("tiny", settings).embed_pool({{"00000": rows}}, pool, on_rows=stop))
"""
    (tmp_path / "killed.py").write_text(code)
    root = str(Path(__file__).resolve().parents[3])
    # the processes hold stdout as well: this returns when the last of them has ended, or never
    done = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py")],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2


class Narrow(torch.nn.Module):
    """An image tower whose forward pass runs out of memory above some rows."""

    def __init__(self, tower: torch.nn.Module, rows: int, error: Exception) -> None:
        super().__init__()
        self.tower = tower
        self.image_size = tower.image_size
        self.rows = rows
        self.error = error
        self.passes: list[int] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed the pixels."""
        self.passes.append(len(pixels))
        if len(pixels) > self.rows:
            raise self.error
        return self.tower(pixels)


def narrow(ours: Encoder, rows: int, error: Exception | None = None) -> Narrow:
    model = ours.loaded.model
    model.visual = Narrow(model.visual, rows, error or torch.OutOfMemoryError("CUDA out of memory."))
    return model.visual


CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), CPU_ERROR, MemoryError()])
def test_a_batch_that_the_memory_does_not_hold_is_halved_once_and_loses_no_shard(
    tiny_clip: Path, pool: Pool, error: Exception
) -> None:
    rows = tables(pool)
    wide = dict(encoder(tiny_clip, batch_size=5).embed_pool(rows, pool))
    ours = encoder(tiny_clip, batch_size=5)
    tower = narrow(ours, 1, error)
    found = dict(ours.embed_pool(rows, pool))
    for name in rows:
        one, other = found[name], wide[name]
        assert isinstance(one, Embeddings)
        assert isinstance(other, Embeddings)
        np.testing.assert_allclose(one.image, other.image, atol=5e-4)
        np.testing.assert_allclose(one.text, other.text, atol=5e-4)
    assert tower.passes == [5, 2, *[1] * 12]
    assert ours.rows_at_once == 1


def test_a_halved_batch_is_said_in_the_log_and_of_the_shard_where_it_happened(
    tiny_clip: Path, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    ours = encoder(tiny_clip, batch_size=6)
    narrow(ours, 3)
    first, second = [found for _, found in ours.embed_pool(tables(pool), pool)]
    assert isinstance(first, Embeddings)
    assert isinstance(second, Embeddings)
    (note,) = first.notes
    assert "out of memory with 6 samples a forward pass; 3 are taken" in note
    assert second.notes == []
    assert caplog.messages == [f"encoder tiny: {note}"]
    again = encoder(tiny_clip, batch_size=6)
    narrow(again, 3)
    assert again.embed_images([(str(i), picture(i)) for i in range(6)]).notes == first.notes


def test_a_single_row_that_the_memory_does_not_hold_fails_its_shard_with_the_remedy(
    tiny_clip: Path, pool: Pool
) -> None:
    ours = encoder(tiny_clip)
    narrow(ours, 0)
    for _, found in ours.embed_pool(tables(pool), pool):
        assert isinstance(found, EncoderError)
        assert "out of memory with one sample" in str(found)
        assert "set precision to bf16" in str(found)


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(tiny_clip: Path, pool: Pool) -> None:
    ours = encoder(tiny_clip)
    tower = narrow(ours, 1, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(ours.embed_pool(tables(pool), pool))
    assert tower.passes == [4]


def counted_images(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Count every decoded image."""
    seen: list[int | None] = []
    decode = images.picture

    def count(data: bytes, max_pixels: int | None = None, draft: int | None = None) -> Any:
        seen.append(draft)
        return decode(data, max_pixels, draft)

    monkeypatch.setattr(images, "picture", count)
    return seen


@pytest.mark.parametrize("sizes", [(4, 2, 64), (1, 5, 3), (64, 6, 4)])
def test_encoders_that_embed_together_decode_once_and_give_to_the_bit_what_each_gives_alone(
    tiny_clip: Path, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    config = json.loads(json.dumps(TINY_CONFIG))
    config["model_cfg"]["vision_cfg"]["image_size"] = 24
    config["model_cfg"]["text_cfg"]["context_length"] = 12
    same, other = write_clip(tmp_path / "same", TINY_CONFIG, seed=1), write_clip(tmp_path / "other", config, seed=2)
    folders = [tiny_clip, same, other]
    ours = [encoder(folder, batch_size=size) for folder, size in zip(folders, sizes, strict=True)]
    alone = [dict(one.embed_pool(tables(pool), pool)) for one in ours]
    decoded = counted_images(monkeypatch)
    done: list[int] = []
    together = dict(embed_together(ours, tables(pool), pool, done.append))
    assert decoded == [None] * 12
    assert sum(done) == 12
    for name, found in together.items():
        for one, by_name in zip(found, alone, strict=True):
            expected = by_name[name]
            assert isinstance(one, Embeddings)
            assert isinstance(expected, Embeddings)
            assert np.array_equal(one.image, expected.image)
            assert np.array_equal(one.text, expected.text)


def test_what_two_encoders_prepare_alike_is_prepared_once(tiny_clip: Path, tmp_path: Path) -> None:
    config = json.loads(json.dumps(TINY_CONFIG))
    config["preprocess_cfg"]["interpolation"] = "bilinear"
    config["model_cfg"]["text_cfg"]["context_length"] = 12
    first = encoder(tiny_clip).loaded
    second = encoder(write_clip(tmp_path / "alike", TINY_CONFIG, seed=1)).loaded
    third = encoder(write_clip(tmp_path / "other", config)).loaded
    assert (first.look_key, first.tokenizer_key) == (second.look_key, second.tokenizer_key)
    assert first.look_key != third.look_key
    assert first.tokenizer_key != third.tokenizer_key
    assert encoder(tiny_clip, decode="draft").loaded.look_key != first.look_key


def test_an_encoder_that_fails_leaves_the_others_that_embed_with_it(tiny_clip: Path, pool: Pool) -> None:
    ours, failing = encoder(tiny_clip), encoder(tiny_clip)
    narrow(failing, 0)
    for _, (failed, found) in embed_together([failing, ours], tables(pool), pool):
        assert isinstance(failed, EncoderError)
        assert isinstance(found, Embeddings)
        assert found.image.shape == (6, 16)


def test_a_draft_is_of_no_side_smaller_than_the_model_takes_and_near_the_exact_picture(tiny_clip: Path) -> None:
    large = picture(0, 200, 130)
    assert images.picture(large).size == (200, 130)
    assert images.picture(large, draft=32).size == (50, 33)
    assert images.picture(large, draft=70).size == (200, 130)
    png = picture(0, 200, 130, "PNG")
    assert images.picture(png, draft=32).size == (200, 130)
    named = [(str(i), picture(i, 200, 130)) for i in range(4)]
    exact = encoder(tiny_clip).embed_images(named).image.astype(np.float64)
    draft = encoder(tiny_clip, decode="draft").embed_images(named).image.astype(np.float64)
    assert not np.array_equal(exact, draft)
    assert (exact * draft).sum(axis=1).min() > 0.99


def test_preprocessing_is_open_clips_bit_for_bit_of_the_rgb_picture(tiny_clip: Path) -> None:
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(picture(1, 60, 33))).save(rotated, "JPEG", exif=exif)
    odd = {
        "wide.jpg": picture(0, 200, 31),
        "small.png": picture(1, 17, 16, "PNG"),
        "cmyk.jpg": picture(2, 50, 70, mode="CMYK"),
        "grey.jpg": picture(3, 50, 70, mode="L"),
        "rgba.png": picture(4, 50, 70, "PNG", "RGBA"),
        "palette.png": picture(5, 50, 70, "PNG", "P"),
        "rotated.jpg": rotated.getvalue(),
    }
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    (batch,) = [Prepare([Look(transform)])[item] for item in ImageWork(odd.items(), 64, 10**6)]
    assert batch.faults == []
    for tensor, data in zip(batch.images[0], odd.values(), strict=True):
        assert torch.equal(tensor, transform(Image.open(io.BytesIO(data)).convert("RGB")))
    for name in ("wide.jpg", "grey.jpg", "rotated.jpg"):  # where it makes no difference
        tensor = batch.images[0][list(odd).index(name)]
        assert torch.equal(tensor, transform(Image.open(io.BytesIO(odd[name]))))


def test_channels_last_changes_no_embedding_by_more_than_rounding(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "conv", TINY_CONVOLUTIONAL_CONFIG)
    blobs = [picture(i) for i in range(5)]
    image, _ = reference(folder, blobs, ["x"])
    for setting, expected in ((None, True), (True, True), (False, False)):
        ours = encoder(folder, channels_last=setting)
        assert ours.loaded.channels_last == expected
        found = ours.embed_images([(str(i), data) for i, data in enumerate(blobs)])
        np.testing.assert_allclose(found.image, image, atol=1e-3)


def test_images_that_cannot_be_decoded_are_named_and_the_others_embedded(tiny_clip: Path) -> None:
    named = [("a", picture(0)), ("bad", b"text"), ("empty", b""), ("b", picture(1))]
    for batch_size in (1, 3):
        found = encoder(tiny_clip, batch_size=batch_size).embed_images(named)
        assert found.kept.tolist() == [0, 3]
        assert [name for name, _ in found.faults] == ["bad", "empty"]
        assert "image_empty" in found.faults[1][1]
        image, _ = reference(tiny_clip, [picture(0), picture(1)], ["x"])
        np.testing.assert_allclose(found.image, image, atol=5e-4)
    nothing = encoder(tiny_clip).embed_images([("bad", b"text")])
    assert nothing.image.shape == (0, 16)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_models_give_the_same_embeddings_also_of_a_last_small_batch(tiny_clip: Path, pool: Pool) -> None:
    rows = tables(pool)
    plain = dict(encoder(tiny_clip).embed_pool(rows, pool))
    compiled = dict(encoder(tiny_clip, compile=True).embed_pool(rows, pool))
    for name in rows:
        one, other = compiled[name], plain[name]
        assert isinstance(one, Embeddings)
        assert isinstance(other, Embeddings)
        np.testing.assert_allclose(one.image, other.image, atol=5e-4)
        np.testing.assert_allclose(one.text, other.text, atol=5e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "amp_bf16", "amp_fp16"])
def test_half_precision_stays_close_to_single(tiny_clip: Path, precision: str) -> None:
    named = [(str(i), picture(i)) for i in range(4)]
    single = encoder(tiny_clip).embed_images(named).image.astype(np.float64)
    half = encoder(tiny_clip, precision=precision).embed_images(named).image.astype(np.float64)
    assert (single * half).sum(axis=1).min() > 0.999


def test_the_temperature_is_the_models_own_unless_set(tiny_clip: Path, tmp_path: Path) -> None:
    model = open_clip.create_model(f"local-dir:{tiny_clip}")
    own = math.exp(-model.logit_scale.item())
    assert encoder(tiny_clip).temperature() == pytest.approx(own, rel=1e-6)
    assert encoder(tiny_clip, temperature=0.02).temperature() == 0.02
    shutil.copytree(tiny_clip, tmp_path / "copy")
    state = model.state_dict()
    state["logit_scale"] = torch.tensor(math.log(20.0))
    torch.save(state, tmp_path / "copy" / "open_clip_model.bin")
    (tmp_path / "copy" / "open_clip_model.safetensors").unlink()
    assert encoder(tmp_path / "copy").temperature() == pytest.approx(0.05, rel=1e-6)


def test_weights_that_are_cut_are_named_whatever_is_asked_of_them(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "cut")
    weights = tmp_path / "cut" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for ask in (Encoder.temperature, lambda cut: cut.loaded):
        with pytest.raises(EncoderError, match=r"encoder tiny: cannot load local-dir:.*cut.*Check the files"):
            ask(encoder(tmp_path / "cut"))


def test_an_identity_follows_the_files_and_the_precision_and_nothing_else(tiny_clip: Path, tmp_path: Path) -> None:
    identity = encoder(tiny_clip).identity()
    assert json.loads(json.dumps(identity)) == identity
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_clip, copy)
    free = {"batch_size": 9, "workers": 3, "device": "cpu", "channels_last": True, "compile": True}
    assert encoder(copy, **free).identity() == identity
    for numbers in ({"precision": "bf16"}, {"precision": "amp_bf16"}, {"decode": "draft"}):
        assert encoder(copy, **numbers).identity() != identity
    assert encoder(copy, decode="exact").identity() == identity
    weights = bytearray((copy / "open_clip_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "open_clip_model.safetensors").write_bytes(weights)
    assert encoder(copy).identity() != identity


def test_a_named_models_identity_is_its_tag_and_preprocessing() -> None:
    found = Encoder("b", EncoderSettings(model="ViT-B-32", pretrained="openai")).identity()
    assert (found["model"], found["pretrained"]) == ("ViT-B-32", "openai")
    assert found["preprocess"]["quick_gelu"] is True


def test_weights_trained_with_quick_gelu_are_run_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stop(_: str, **options: Any) -> None:
        asked.update(options)
        raise RuntimeError("no download here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", stop)
    for tag, expected in (("openai", True), ("laion2b_e16", None)):
        with pytest.raises(EncoderError, match=r"no download here.*local-dir"):
            _ = Encoder("b", EncoderSettings(model="ViT-B-32", pretrained=tag)).loaded
        assert asked.pop("force_quick_gelu", None) is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "VIT-B32", "pretrained": "openai"},
            r"no model 'VIT-B32' \(did you mean .*ViT-B-32.*list_models",
        ),
        (
            {"model": "ViT-B-32", "pretrained": "openia"},
            r"no pretrained tag 'openia'.*did you mean openai.*laion2b",
        ),
        ({"model": "ViT-B-32"}, r"random weights.*openai"),
        ({"model": "local-dir:/no/such/folder"}, r"/no/such/folder does not exist.*open_clip_config"),
    ],
)
def test_an_unknown_model_is_named_with_what_is_near_and_the_remedy(options: dict[str, str], message: str) -> None:
    unknown = Encoder("wrong", EncoderSettings(**options))
    with pytest.raises(EncoderError, match=rf"(?s)encoder wrong: .*{message}"):
        unknown.identity()
    with pytest.raises(EncoderError, match=rf"(?s)encoder wrong: .*{message}"):
        _ = unknown.loaded


def test_a_model_folder_that_is_not_whole_says_what_is_missing(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"lacks open_clip_config\.json and open_clip_model"):
        encoder(tmp_path).identity()
    shutil.copy(tiny_clip / "open_clip_config.json", tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(EncoderError, match=r"cannot load local-dir:.*Check the files"):
        _ = encoder(tmp_path).loaded


def test_a_hub_model_that_is_not_cached_says_so_when_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub = Encoder("hub", EncoderSettings(model="hf-hub:nobody/no-such-model"))
    for attempt in (hub.identity, lambda: hub.loaded):
        with pytest.raises(EncoderError, match=r"cannot load hf-hub:nobody.*HF_HUB_OFFLINE"):
            attempt()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_an_error(tiny_clip: Path) -> None:
    with pytest.raises(EncoderError, match=r"cuda:3 is not there.*auto or cpu"):
        _ = encoder(tiny_clip, device="cuda:3").loaded


def test_a_precomputed_encoder_reads_the_pool_and_has_no_model(tmp_path: Path) -> None:
    datacomp_shard(tmp_path, "00000")
    datacomp_shard(tmp_path, "00001")
    precomputed = EncoderSettings(precomputed="b32", temperature=0.01)
    pool = open_pool(PoolSettings(path=str(tmp_path), format="datacomp"), {"b32": precomputed})
    rows = tables(pool)
    (tmp_path / "00000.npz").unlink()
    ours = Encoder("b32", precomputed)
    done: list[int] = []
    found = dict(ours.embed_pool(rows, pool, on_rows=done.append))
    assert isinstance(found["00000"], EncoderError)
    assert "00000.parquet has no npz" in str(found["00000"])
    assert isinstance(found["00001"], Embeddings)
    assert np.array_equal(found["00001"].image, unit_rows(1, 6))
    assert done == [6]
    assert ours.identity() == {"precomputed": "b32"}
    assert ours.temperature() == 0.01
    with pytest.raises(EncoderError, match="only reads precomputed"):
        ours.embed_images([])


@pytest.mark.skipif(not MODEL.is_dir(), reason=f"the real model is not at {MODEL}")
def test_a_real_model_gives_the_embeddings_that_were_stored() -> None:
    root = SHARED / "data" / "pools"
    pool = open_pool(PoolSettings(path=str(root / "real")), {})
    rows = pool.read_shard("00001").rows.slice(100, 24)
    ours = Encoder("m", EncoderSettings(model=f"local-dir:{MODEL}", workers=0, batch_size=24))
    ((_, found),) = ours.embed_pool({"00001": rows}, pool)
    assert isinstance(found, Embeddings)
    stored = np.load(root / "real_datacomp" / "00001.npz")
    np.testing.assert_allclose(found.image, stored["b32_img"][100:124], atol=4e-3)
    np.testing.assert_allclose(found.text, stored["b32_txt"][100:124], atol=4e-3)


def test_long_captions_have_the_tokens_of_the_whole_caption() -> None:
    import open_clip

    from resources.models.decoding import MAX_CAPTION, _bounded

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    words = " ".join(f"word{number} of  many\n" for number in range(2000))
    for text in (words, " " * 10_000 + words, "short"):
        assert len(_bounded(text)) <= MAX_CAPTION
        assert tokenizer([_bounded(text)]).equal(tokenizer([text]))
    assert len(_bounded("x" * 20_000)) == MAX_CAPTION
