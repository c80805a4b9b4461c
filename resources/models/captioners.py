"""Captioners: several captions of each image, by nucleus sampling, seeded by the uid.

The libraries' own `generate` draws from one generator for a whole batch, so a caption would depend on the other rows of
its batch (and open_clip's needs classes that transformers has dropped). This module samples itself, from any model that
returns the logits of the next token (`resources.models.caption_models`). torch is imported inside functions, so that
this module loads at once.
"""

import contextlib
import hashlib
from collections.abc import Generator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from resources.models import decoding
from resources.models.caption_models import Blip, CaptionModel, Coca
from resources.models.decoding import EncoderError
from resources.pools.base import Pool
from resources.settings import CaptionerSettings

if TYPE_CHECKING:
    import torch

LIKELIEST = 512  # tokens sorted first; they contain the nucleus unless the distribution is nearly flat


class Captioner:
    """One captioner of a project.

    Args:
        name: what the project calls it.
        settings: its model, and how captions are sampled.
    """

    def __init__(self, name: str, settings: CaptionerSettings) -> None:
        self.name = name
        self.settings = settings
        self._model = Blip(name, settings) if settings.library == "transformers" else Coca(name, settings)

    def identity(self) -> dict[str, Any]:
        """Return what decides captions apart from an image's pixels and uid, as JSON values; the model is not loaded.

        Raises:
            EncoderError: there is no such model, or its files are missing.
        """
        sampling = ("captions", "top_p", "min_tokens", "max_tokens", "repetition_penalty", "seed")
        prompt = {"prompt": self.settings.first_words} if self.settings.first_words else {}
        return {**self._model.identity(), **prompt, **{field: getattr(self.settings, field) for field in sampling}}

    @cached_property
    def loaded(self) -> CaptionModel:
        """The model, loaded once.

        Raises:
            EncoderError: it cannot be loaded, does not caption images, or not at such length.
        """
        loaded = self._model.load()
        if self.settings.max_tokens >= loaded.longest:
            raise EncoderError(
                f"captioner {self.name}: max_tokens is {self.settings.max_tokens}, and the model takes "
                f"{loaded.longest} with the start token. Remedy: max_tokens up to {loaded.longest - 1}"
            )
        return loaded

    @cached_property
    def prompt(self) -> list[int]:
        """The start token and the prompt's tokens.

        Raises:
            EncoderError: they leave no token for a caption.
        """
        words = self.settings.first_words
        tokens = [self.loaded.start, *(self.loaded.encode(words) if words else [])]
        if words and len(tokens) >= self.settings.max_tokens:
            raise EncoderError(
                f"captioner {self.name}: max_tokens is {self.settings.max_tokens}, and the prompt {words!r} takes "
                f"{len(tokens)} with the start token. Remedy: more max_tokens, or a shorter prompt"
            )
        return tokens

    def caption_pool(
        self, shards: Mapping[str, pa.Table], pool: Pool
    ) -> Generator[tuple[str, list[list[str]] | EncoderError, bool], None, None]:
        """Caption the images of shards, one batch after the other.

        Args:
            shards: name to raw_pool rows, all or some of the shard.
            pool: where the bytes are.

        Yields:
            A shard's name; the captions of its next rows, or this shard's error; and whether these are its last rows.
            A caption depends on the image, the uid and the settings. All batches have one shape, so a caption does not
            depend on the other rows; another `batch_size` may round differently, which changes a word now and then.

        Raises:
            EncoderError: the model cannot be used.
        """
        loaded = self.loaded
        work = decoding.ShardWork(shards, self.settings.batch_size)
        batches = decoding.run(
            decoding.Prepare([loaded.look], pool=pool), work, self.settings.workers, pin=loaded.device.type == "cuda"
        )
        with contextlib.closing(batches):
            for shard in shards:
                done, failed, last = 0, False, False
                while not last:
                    batch = next(batches)
                    last = batch.last
                    if failed:
                        continue
                    if batch.error is not None:
                        failed = True
                        yield shard, EncoderError(f"captioner {self.name}: {batch.error}"), True
                        continue
                    uids = shards[shard]["uid"].slice(done, batch.rows).to_pylist()
                    done += batch.rows
                    yield shard, self.describe(batch.images[0], uids) if uids else [], last

    def describe(self, images: "torch.Tensor", uids: list[str]) -> list[list[str]]:
        """Caption preprocessed images.

        Args:
            images: float32 `[n, 3, height, width]`, n up to the batch size.
            uids: of the images; they seed the sampling.

        Returns:
            The captions of each image without the prompt, lower case as the tokenizer has them, in the order of their
            numbers.

        Raises:
            EncoderError: memory does not hold a batch.
        """
        import torch

        settings = self.settings
        rows = len(images)
        draws = np.stack([uniforms(settings.seed, uid, settings.captions, settings.max_tokens) for uid in uids])
        missing = settings.batch_size - rows
        if missing > 0:  # one shape for all batches: products of another shape may be summed in another order
            images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
            draws = np.concatenate([draws, np.repeat(draws[:1], missing, axis=0)])
        try:
            tokens = self._sample(images, draws)[:rows].tolist()
        except torch.OutOfMemoryError as error:
            raise EncoderError(
                f"captioner {self.name}: {self.loaded.device} ran out of memory with {settings.batch_size} images of "
                f"{settings.captions} captions. Remedy: a smaller batch_size"
            ) from error
        return [[self._text(caption) for caption in of_image] for of_image in tokens]

    def _text(self, tokens: list[int]) -> str:
        loaded, prompt = self.loaded, self.prompt[1:]
        end = tokens.index(loaded.end) if loaded.end in tokens else len(tokens)
        first_words = loaded.tokenizer.decode(prompt).strip() if prompt else ""
        # Decoded together, so that a token that continues the prompt's last word is still a piece of a word.
        text = loaded.tokenizer.decode(prompt + tokens[:end]).strip().removeprefix(first_words)
        return " ".join(text.split())

    def _sample(self, images: "torch.Tensor", draws: np.ndarray) -> "torch.Tensor":
        """Sample captions, int64 `[n, captions, up to max_tokens]` without the prompt.

        Tokens after the end token mean nothing.
        """
        import torch

        loaded, settings = self.loaded, self.settings
        n, k, longest = draws.shape
        prompt = torch.tensor(self.prompt, device=loaded.device)
        counted = len(prompt) if len(prompt) > 1 else 0  # as in the published code: a prompt with the start token
        layout = torch.channels_last if loaded.channels_last else torch.contiguous_format
        products = torch.autocast(loaded.device.type, loaded.autocast, enabled=loaded.autocast is not None)
        uniform = torch.from_numpy(draws.reshape(n * k, longest)).to(loaded.device)
        generated = prompt.expand(n * k, -1)
        ended = torch.zeros(n * k, dtype=torch.bool, device=loaded.device)
        with torch.inference_mode(), products:
            pixels = images.to(loaded.device, loaded.dtype, non_blocking=True, memory_format=layout)
            next_logits = loaded.begin(pixels, k)
            for place in range(longest - counted):
                logits = next_logits(generated)
                if generated.shape[1] > 1:
                    logits = penalised(logits, generated[:, 1:], settings.repetition_penalty)
                logits[:, loaded.banned_tokens] = -torch.inf
                if counted + place < settings.min_tokens:
                    logits[:, loaded.end] = -torch.inf
                token = choose(logits, uniform[:, place], settings.top_p)
                token[ended] = loaded.end
                generated = torch.cat([generated, token[:, None]], dim=1)
                ended |= token == loaded.end
                if ended.all():
                    break
        return generated[:, len(prompt) :].reshape(n, k, -1).cpu()


def uniforms(seed: int, uid: str, captions: int, tokens: int) -> np.ndarray:
    """Return the numbers in [0, 1) that choose an image's tokens, float64 `[captions, tokens]`: a keyed hash.

    Caption k stays the same when more captions are asked for, and its first tokens when `tokens` grows.
    """
    raw = [hashlib.shake_128(f"{seed}/{uid}/{k}".encode()).digest(8 * tokens) for k in range(captions)]
    words = np.frombuffer(b"".join(raw), dtype="<u8").reshape(captions, tokens)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def penalised(logits: "torch.Tensor", generated: "torch.Tensor", penalty: float) -> "torch.Tensor":
    """Lower the logits of tokens that were generated before, after CTRL (arXiv 1909.05858).

    Positive logits are divided by `penalty`, negative ones multiplied.

    Args:
        logits: float32 `[rows, vocabulary]`.
        generated: int64 `[rows, any]`.
        penalty: at least 1, which changes nothing.
    """
    import torch

    old = logits.gather(1, generated)
    return logits.scatter(1, generated, torch.where(old > 0, old / penalty, old * penalty))


def choose(logits: "torch.Tensor", uniform: "torch.Tensor", top_p: float) -> "torch.Tensor":
    """Choose one token per row by nucleus sampling (arXiv 1904.09751).

    The nucleus is the smallest set of likeliest tokens with `top_p` of the probability. The uniform number picks from
    it, likeliest token first.

    Args:
        logits: float32 `[rows, vocabulary]`; -inf is never chosen.
        uniform: float64 `[rows]`, in [0, 1).
        top_p: in (0, 1].

    Returns:
        Tokens, int64 `[rows]`.
    """
    probability = logits.softmax(dim=1)
    likely, tokens = probability.topk(min(LIKELIEST, logits.shape[1]), dim=1)
    if (likely.double().sum(dim=1) < top_p).any():
        likely, tokens = probability.sort(dim=1, descending=True, stable=True)
    summed = likely.double().cumsum(dim=1)
    inside = (summed - likely < top_p) & (likely > 0)
    inside[:, 0] = True
    last = inside.sum(dim=1, keepdim=True) - 1
    pointed = (summed <= uniform[:, None] * summed.gather(1, last)).sum(dim=1, keepdim=True)
    return tokens.gather(1, pointed.minimum(last))[:, 0]
