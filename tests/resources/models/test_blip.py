"""Captions by a small random BLIP of transformers; tests/assets/scores/test_sieve.py tests what captioners share."""

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resources.models.captioners import Captioner, uniforms
from resources.models.decoding import EncoderError
from resources.models.text_encoders import TextEncoder
from resources.pools.formats import open_pool
from resources.settings import CaptionerSettings, PoolSettings, TextEncoderSettings
from tests.support.captioning import SPEECH, UIDS, nucleus_token, pixels
from tests.support.pool_factory import sample, write_shard
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "dog",
    "boat",
    "tree",
    "house",
    "runs",
    "floats",
    "on",
    "under",
    "##s",
    "##ish",
    ",",
]
PAD, UNK, CLS, SEP, MASK = range(5)
DEC, ENC = len(SPECIAL + WORDS), len(SPECIAL + WORDS) + 1  # which the tokenizer does not have, as on the hub
SIDE = 32


def write_blip(folder: Path, **biases: float) -> Path:
    """Write a BLIP with random weights as `save_pretrained` does; `biases` are by token name."""
    transformers = pytest.importorskip("transformers", reason="needs pip install '.[blip]'")
    config = transformers.BlipConfig(
        text_config={
            "vocab_size": ENC + 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "bos_token_id": DEC,
            "sep_token_id": SEP,
            "pad_token_id": PAD,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
    )
    model = transformers.BlipForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
        for token in (UNK, CLS, MASK, PAD, DEC, ENC):
            model.text_decoder.cls.predictions.bias[token] = biases.get("special", -20.0)
        model.text_decoder.cls.predictions.bias[SEP] = biases.get("end", 1.0)
    model.save_pretrained(folder)
    tokenizer = transformers.BertTokenizer({word: number for number, word in enumerate(SPECIAL + WORDS)})
    image_processor = transformers.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    transformers.BlipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip(tmp_path_factory.mktemp("tiny_blip"))


def captioner(folder: Path | str, **settings: object) -> Captioner:
    document = {
        "library": "transformers",
        "model": f"local-dir:{folder}",
        "workers": 0,
        "batch_size": 4,
        "prompt": "",
        **SPEECH,
        **settings,
    }
    return Captioner("blip", CaptionerSettings(**document))


def tokens_of(chosen: Captioner, images: torch.Tensor) -> list[list[list[int]]]:
    """Return for each image the tokens of its captions, without the end token."""
    settings = chosen.settings
    draws = np.stack([uniforms(settings.seed, u, settings.captions, settings.max_tokens) for u in UIDS[: len(images)]])
    said = chosen._sample(images, draws).tolist()
    return [[caption[: caption.index(SEP)] if SEP in caption else caption for caption in image] for image in said]


# What is said


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_the_narrowest_nucleus_says_what_transformers_own_greedy_search_says(tiny_blip, penalty):
    images = pixels(4)
    ours = captioner(tiny_blip, captions=1, top_p=1e-9, max_tokens=12, min_tokens=3, repetition_penalty=penalty)
    greedy = ours.loaded.model.generate(
        pixel_values=images, do_sample=False, max_new_tokens=12, min_new_tokens=3, repetition_penalty=penalty
    )
    assert (greedy[:, 0] == DEC).all()
    expected = [row[: row.index(SEP)] if SEP in row else row for row in greedy[:, 1:].tolist()]
    assert [caption for (caption,) in tokens_of(ours, images)] == expected
    assert len({tuple(row) for row in expected}) > 1


def test_a_prompt_starts_every_caption_counts_and_is_cut_off_as_in_the_published_code(tiny_blip):
    """The published code is transformers' `generate`, of which min_length and max_length include prompt and start."""
    images = pixels(4)
    chosen = {"captions": 1, "top_p": 1e-9, "max_tokens": 12, "min_tokens": 6, "repetition_penalty": 1.5}
    ours = captioner(tiny_blip, prompt="the dog ", **chosen)
    the, dog = (len(SPECIAL) + WORDS.index(word) for word in ("the", "dog"))
    greedy = ours.loaded.model.generate(
        pixel_values=images,
        input_ids=torch.tensor([[CLS, the, dog, SEP]] * 4),
        do_sample=False,
        max_length=12,
        min_length=6,
        repetition_penalty=1.5,
    )
    assert (greedy[:, :3] == torch.tensor([DEC, the, dog])).all()
    expected = [row[: row.index(SEP)] if SEP in row else row for row in greedy[:, 3:].tolist()]
    assert [caption for (caption,) in tokens_of(ours, images)] == expected
    assert max(len(row) for row in expected) <= 9
    assert len({tuple(row) for row in expected}) > 1
    without = captioner(tiny_blip, **chosen)
    assert [caption for (caption,) in tokens_of(without, images)] != expected
    whole = ours.loaded.tokenizer.batch_decode(greedy, skip_special_tokens=True)
    assert [said for (said,) in ours.describe(images, UIDS)] == [text.removeprefix("the dog").strip() for text in whole]


def test_a_blip_has_the_published_prompt_by_default_and_a_coca_has_none():
    assert CaptionerSettings(library="transformers", model="some/blip").first_words == "a picture of "
    assert CaptionerSettings(library="transformers", model="some/blip", prompt="").first_words == ""
    assert CaptionerSettings(model="coca_ViT-L-14").first_words == ""


def test_a_prompt_that_leaves_no_token_is_refused(tiny_blip):
    long = captioner(tiny_blip, prompt="the red dog ", max_tokens=4, min_tokens=2)
    with pytest.raises(EncoderError, match=r"max_tokens is 4, and the prompt 'the red dog ' takes 4 .*Remedy"):
        long.describe(pixels(1), UIDS[:1])


def test_the_words_are_those_that_transformers_own_forward_pass_makes_likely(tiny_blip):
    """Step by step with the model's public forward pass, in float64, without a key-value cache."""
    images = pixels(3)
    ours = captioner(tiny_blip, batch_size=3, captions=4, max_tokens=9, repetition_penalty=1.3)
    found = tokens_of(ours, images)
    said = ours.describe(images, UIDS[:3])
    for row in range(3):
        for k in range(4):
            tokens = [DEC]
            for place, uniform in enumerate(uniforms(0, UIDS[row], 4, 9)[k]):
                with torch.no_grad():
                    logits = ours.loaded.model(images[row : row + 1], torch.tensor([tokens])).logits
                logits = logits[0, -1].double().numpy().copy()
                for token in set(tokens[1:]):
                    logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
                logits[[PAD, UNK, CLS, MASK, DEC, ENC]] = -np.inf
                if place < 2:
                    logits[SEP] = -np.inf
                token = nucleus_token(logits, uniform, 0.9)
                if token == SEP:
                    break
                tokens.append(token)
            assert found[row][k] == tokens[1:]
            words = " ".join((SPECIAL + WORDS)[token] for token in tokens[1:]).replace(" ##", "")
            assert said[row][k].replace(" ,", ",") == words.replace(" ,", ",")


def test_captions_follow_the_uid_whatever_the_batch_and_the_order(tiny_blip):
    images = pixels(4)
    together = captioner(tiny_blip).describe(images, UIDS)
    assert all(len(said) == 3 for said in together)
    assert len({caption for said in together for caption in said}) > 6
    assert captioner(tiny_blip).describe(images.flip(0), UIDS[::-1])[::-1] == together
    assert [captioner(tiny_blip).describe(images[i : i + 1], UIDS[i : i + 1])[0] for i in range(4)] == together
    assert captioner(tiny_blip, captions=2).describe(images, UIDS) == [said[:2] for said in together]
    assert captioner(tiny_blip, seed=1).describe(images, UIDS) != together
    assert captioner(tiny_blip).describe(images, UIDS[1:] + UIDS[:1]) != together
    assert captioner(tiny_blip).describe(images.flip(0), UIDS) != together


def test_batches_have_one_shape_so_that_no_sum_depends_on_the_rows_beside(tiny_blip):
    shapes = set()
    chosen = captioner(tiny_blip)
    chosen.loaded.model.text_decoder.register_forward_pre_hook(
        lambda _, __, given: shapes.add((len(given["input_ids"]), *given["encoder_hidden_states"].shape)),
        with_kwargs=True,
    )
    for rows in (1, 3, 4):
        assert len(chosen.describe(pixels(4)[:rows], UIDS[:rows])) == rows
    assert shapes == {(4, 4, 17, 16), (4 * 3, 4, 17, 16)}


def test_a_caption_has_at_least_and_at_most_so_many_tokens(tiny_blip):
    def lengths(least: int) -> set[int]:
        chosen = captioner(tiny_blip, min_tokens=least, max_tokens=6, captions=40)
        return {len(caption) for image in tokens_of(chosen, pixels(4)) for caption in image}

    assert lengths(0) >= {0, 6}
    assert min(lengths(3)) == 3
    assert lengths(6) == {6}


def test_tokens_that_are_no_words_are_never_said_however_likely(tmp_path):
    eager = captioner(write_blip(tmp_path, special=30.0, end=-20.0), captions=8)
    said = {token for image in tokens_of(eager, pixels(4)) for caption in image for token in caption}
    assert said <= set(range(len(SPECIAL), DEC))


@pytest.mark.parametrize(
    ("precision", "weights"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("amp_bf16", torch.float32), ("amp_fp16", torch.float32)],
)
def test_a_blip_speaks_in_every_precision(tiny_blip, precision, weights):
    chosen = captioner(tiny_blip, precision=precision)
    said = chosen.describe(pixels(4), UIDS)
    assert {parameter.dtype for parameter in chosen.loaded.model.parameters()} == {weights}
    assert all(caption for image in said for caption in image)
    assert chosen.identity() != captioner(tiny_blip).identity()


# From bytes, and from the files


def test_images_are_prepared_by_the_models_own_processor_in_worker_processes(tiny_blip, tmp_path):
    from transformers import BlipProcessor

    samples = [sample(i, "00000") for i in range(6)]
    write_shard(tmp_path, samples, "00000")
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    rows = pool.read_shard("00000").rows
    found: list[list[str]] = []
    for _, said, _ in captioner(tiny_blip, workers=1).caption_pool({"00000": rows}, pool):
        assert not isinstance(said, EncoderError)
        found += said
    processor = BlipProcessor.from_pretrained(tiny_blip)
    by_key = {item.key: item.image for item in samples}
    for key, name, said in zip(rows["key"].to_pylist(), rows["uid"].to_pylist(), found, strict=True):
        (tmp_path / "one.jpg").write_bytes(by_key[key])
        with Image.open(tmp_path / "one.jpg") as picture:
            prepared = processor(images=picture, return_tensors="pt")["pixel_values"]
        assert captioner(tiny_blip).describe(prepared, [name]) == [said]


def test_draft_decodes_a_jpeg_no_smaller_than_the_model_needs(tiny_blip):
    assert captioner(tiny_blip, decode="draft").loaded.look.draft == SIDE
    assert captioner(tiny_blip).loaded.look.draft is None


def test_a_folder_as_transformers_4_wrote_it_says_the_same(tiny_blip, tmp_path):
    """The hub's BLIP-base has this format: pickled weights with a removed buffer, one number for the size."""
    from safetensors.torch import load_file

    state = load_file(tiny_blip / "model.safetensors")
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((tiny_blip / "config.json").read_text()) | {"torch_dtype": "float32", "_commit_hash": None}
    of_generation = {"do_sample": False, "max_length": 20, "num_beams": 1, "top_k": 50, "bad_words_ids": None}
    config["text_config"] |= of_generation | {"eos_token_id": 2, "torchscript": False, "use_bfloat16": False}
    config["vision_config"] |= of_generation | {"dropout": 0.0, "num_channels": 3, "id2label": {"0": "LABEL_0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    preprocessor = json.loads((tiny_blip / "processor_config.json").read_text())["image_processor"]
    kept = ("do_normalize", "do_resize", "image_mean", "image_processor_type", "image_std")
    preprocessor = {name: preprocessor[name] for name in kept} | {"processor_class": "BlipProcessor", "size": SIDE}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL + WORDS) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_basic_tokenize": True, "never_split": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 512}))
    old, new = captioner(tmp_path), captioner(tiny_blip)
    assert old.describe(pixels(4), UIDS) == new.describe(pixels(4), UIDS)
    picture = Image.effect_noise((90, 50), 60).convert("RGB")
    assert torch.equal(old.loaded.look.transform(picture), new.loaded.look.transform(picture))


def test_what_decides_a_caption_is_in_its_identity_and_nothing_else(tiny_blip, tmp_path):
    base = captioner(tiny_blip).identity()
    assert base == captioner(tiny_blip, batch_size=9, workers=1).identity()
    assert "prompt" not in base  # so that captions from before the setting stay up to date without a prompt
    for changed in (
        {"seed": 1},
        {"top_p": 0.5},
        {"captions": 2},
        {"precision": "bf16"},
        {"decode": "draft"},
        {"prompt": "the dog "},
    ):
        assert captioner(tiny_blip, **changed).identity() != base
    json.dumps(base)
    assert "model.safetensors" in base["files"]
    folder = shutil.copytree(tiny_blip, tmp_path / "copy")
    assert captioner(folder).identity() == base
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert captioner(folder).identity() != base


COMMITS = ("0f" * 20, "1e" * 20)
NOT_USED = [".gitattributes", "README.md", "tf_model.h5", "onnx/model.onnx"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Set up an empty hub cache, offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub: Path, commit: str, cached: dict[str, bytes], not_cached: Iterable[str] = ()) -> Path:
    """Write a commit of someone/blip as the hub's library does, as the newest one.

    Its listing also has the files that are not cached, so the library knows that the download is partial.
    """
    repository = hub / "models--someone--blip"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", repository / "trees", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    listing = {name: {"size": 1, "blob_id": "0" * 40} for name in not_cached}
    for name, content in cached.items():
        large = name.endswith((".safetensors", ".bin"))
        of_git = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
        blob = (hashlib.sha256(content) if large else of_git).hexdigest()
        (repository / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
        listing[name] = {"size": len(content), "blob_id": blob}
    (repository / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pickle_of(folder: Path) -> bytes:
    from safetensors.torch import load_file

    file = io.BytesIO()
    torch.save(load_file(folder / "model.safetensors"), file)
    return file.getvalue()


def from_hub() -> Captioner:
    return captioner("", model="someone/blip")


USED = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


def test_a_model_of_the_hub_is_named_by_the_files_that_it_is_made_of(tiny_blip, hub):
    files = contents(tiny_blip)
    cache(hub, COMMITS[0], files | {"README.md": b"a card"})
    base = from_hub().identity()
    json.dumps(base)
    assert (base["library"], base["model"]) == ("transformers", "someone/blip")
    assert base["files"] == {name: hashlib.sha256(files[name]).hexdigest() for name in USED}
    assert from_hub().describe(pixels(4), UIDS) == captioner(tiny_blip).describe(pixels(4), UIDS)
    cache(hub, COMMITS[1], files | {"README.md": b"a better card", "pytorch_model.bin": b"not what is loaded"})
    assert from_hub().identity() == base
    for number, name in enumerate(sorted(USED)):
        cache(hub, f"{number:040d}", files | {name: files[name] + b" "})
        assert {one for one, blob in from_hub().identity()["files"].items() if blob != base["files"][one]} == {name}


def test_a_cache_without_links_and_one_that_shares_files_give_the_same_identity(tiny_blip, hub):
    snapshot = cache(hub, COMMITS[0], contents(tiny_blip))
    base = from_hub().identity()
    blob = (snapshot / "model.safetensors").resolve()
    shared = hub / "blobs" / "ab" / ("ab" * 32)  # by a hash of another kind
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(Path("../../blobs/ab") / shared.name)
    assert from_hub().identity() == base
    for path in snapshot.iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert from_hub().identity() == base


def test_weights_are_not_read_to_know_their_hash(tiny_blip, hub):
    snapshot = cache(hub, COMMITS[0], contents(tiny_blip))
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(b"other weights, under the name that the hub gave to those that were here")
    assert from_hub().identity()["files"]["model.safetensors"] == blob.name


def test_only_files_that_are_used_need_be_there_and_pickled_weights_only_without_others(tiny_blip, hub):
    files = contents(tiny_blip)
    used = {name: files[name] for name in USED}
    cache(hub, COMMITS[0], used, [*NOT_USED, "generation_config.json", "pytorch_model.bin", "model.fp16.safetensors"])
    assert from_hub().identity()["files"].keys() == USED
    pickled = {"pytorch_model.bin": pickle_of(tiny_blip), **used}
    del pickled["model.safetensors"]
    cache(hub, COMMITS[1], pickled, NOT_USED)
    assert from_hub().identity()["files"].keys() == pickled.keys()
    assert from_hub().describe(pixels(4), UIDS) == captioner(tiny_blip).describe(pixels(4), UIDS)
    part = {"pytorch_model.bin.index.json": b"{}", "pytorch_model-00001-of-00002.bin": b"one of two"}
    for number, (there, lacking) in enumerate(
        [
            (pickled, "model.safetensors"),
            (used, "tokenizer.json"),
            (pickled, "vocab.txt"),
            (part, "pytorch_model-00002-of-00002.bin"),
        ]
    ):
        some = {name: content for name, content in there.items() if name != lacking}
        cache(hub, f"{number:040d}", some, [lacking, *NOT_USED])
        with pytest.raises(EncoderError, match=r"captioner blip: cannot load someone/blip: .*Remedy: check the name"):
            from_hub().identity()


def test_the_hub_is_asked_once(tiny_blip, hub):
    cache(hub, COMMITS[0], contents(tiny_blip))
    asked = from_hub()
    base = asked.identity()
    cache(hub, COMMITS[1], {})
    assert asked.identity() == base
    assert asked.describe(pixels(4), UIDS) == captioner(tiny_blip).describe(pixels(4), UIDS)


def test_a_model_that_the_hub_does_not_have_is_an_error(hub):
    cache(hub, COMMITS[0], {"config.json": b"{}"})
    with pytest.raises(EncoderError, match=r"cannot load someone/blip: it has neither model.safetensors nor"):
        from_hub().identity()
    with pytest.raises(EncoderError, match=r"captioner blip: cannot load someone/else: .*Remedy"):
        captioner("", model="someone/else").identity()


def test_a_text_encoder_of_the_hub_is_named_by_its_revision(hub):
    cache(hub, COMMITS[0], {"modules.json": b"[]", "README.md": b"a card"})
    assert TextEncoder("minilm", TextEncoderSettings(model="someone/blip")).identity() == {
        "model": "someone/blip",
        "revision": COMMITS[0],
    }


# What is wrong


def test_transformers_that_is_not_installed_is_one_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EncoderError, match=r"transformers is not installed. Remedy: pip install '.*\[blip\]'"):
        _ = captioner(tmp_path).loaded


def spoilt(tiny_blip: Path, folder: Path) -> Path:
    return shutil.copytree(tiny_blip, folder / "spoilt")


def test_a_folder_that_is_no_describing_blip_is_refused(tiny_blip, tiny_clip, tmp_path):
    for folder in (tiny_clip, tmp_path / "gone"):
        with pytest.raises(EncoderError, match=r"has no config.json. Remedy: the folder of a BLIP"):
            captioner(folder).identity()
    folder = spoilt(tiny_blip, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for broken in ({**config, "architectures": ["BlipForQuestionAnswering"]}, {"model_type": "blip"}, []):
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(EncoderError, match=r"does not describe images.*Remedy: a BlipForConditionalGeneration"):
            _ = captioner(folder).loaded


def test_weights_that_are_missing_are_not_made_up(tiny_blip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = spoilt(tiny_blip, tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"weights lack text_decoder.*crossattention.*Remedy"):
        _ = captioner(folder).loaded


@pytest.mark.parametrize("gone", ["processor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_missing_is_an_error(tiny_blip, tmp_path, gone):
    folder = spoilt(tiny_blip, tmp_path)
    (folder / gone).unlink()
    with pytest.raises(EncoderError, match=r"captioner blip: .*Remedy: (check the files in that folder|a Blip)"):
        _ = captioner(folder).loaded


@pytest.mark.parametrize("size", [{"height": 48, "width": 48}, {"shortest_edge": 32}])
def test_pictures_of_another_size_than_the_model_takes_are_refused(tiny_blip, tmp_path, size):
    folder = spoilt(tiny_blip, tmp_path)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = size
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(EncoderError, match=r"gives pixels of \[3, .*takes \[3, 32, 32\]"):
        _ = captioner(folder).loaded


def test_what_a_blip_cannot_do_is_refused(tiny_blip):
    with pytest.raises(EncoderError, match=r"max_tokens is 16.*Remedy: max_tokens up to 15"):
        _ = captioner(tiny_blip, max_tokens=16).loaded
    with pytest.raises(ValueError, match=r"pretrained.*a BLIP brings its weights"):
        captioner(tiny_blip, pretrained="openai")
    with pytest.raises(ValueError, match=r"hf-hub: is open_clip's. Remedy.*model: a/b"):
        captioner("", model="hf-hub:a/b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_an_error(tiny_blip):
    with pytest.raises(EncoderError, match=r"captioner blip: the device cuda:3 is not there.*auto or cpu"):
        _ = captioner(tiny_blip, device="cuda:3").loaded


def test_a_device_whose_memory_does_not_hold_the_weights_is_no_missing_model(tiny_blip, monkeypatch):
    from transformers import BlipForConditionalGeneration

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(BlipForConditionalGeneration, "to", full)
    with pytest.raises(EncoderError, match=r"captioner blip: cpu ran out of memory with the weights of .*Remedy: free"):
        _ = captioner(tiny_blip).loaded


# In the graph


def test_a_recipe_ranks_by_what_a_blip_says(scenario: Scenario, tiny_blip):
    model = {"library": "transformers", "model": f"local-dir:{tiny_blip}", "workers": 0, "batch_size": 5, **SPEECH}
    model["prompt"] = ""
    scenario.document |= {
        "captioners": {"blip": model},
        "text_encoders": {"own": {"encoder": "tiny"}},
        "scores": {"clip_score": ["tiny"], "neg_clip_loss": {}, "norm_sim": {}},
        "targets": {},
        "recipes": {"best": {"steps": [keep("sieve/blip/own", count=9)]}},
    }
    assert not scenario.run().failures
    captions = scenario.scores("captions/blip")["captions"]
    assert captions.list.len().to_list() == [3] * ROWS * len(SHARDS)
    assert len(set(captions.explode())) > ROWS * len(SHARDS)
    scores = scenario.scores("sieve/blip/own").sort(["sieve", "f0", "f1"], descending=[True, False, False])
    assert set(scores.head(9)["f0"]) == set(scenario.manifest("best")["f0"])
    record = scenario.subset("best").lineage
    assert record["project"]["captioners"]["blip"]["library"] == "transformers"
    assert "transformers" in record["packages"]
    assert not scenario.run().computed
    scenario.set("captioners", "blip", "seed", value=1)
    assert not scenario.run().failures
    assert not scenario.scores("captions/blip")["captions"].equals(captions)
    scenario.set("captioners", "blip", "prompt", value="the dog ")
    assert set(scenario.run().computed) >= {"captions/blip", "sieve/blip/own"}
