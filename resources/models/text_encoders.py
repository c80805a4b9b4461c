"""Text encoders: texts to unit vectors, by sentence-transformers or by the text tower of a CLIP encoder.

sentence-transformers (the extra `sieve`) is imported inside functions.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from resources.models.decoding import EncoderError
from resources.models.encoders import Encoder
from resources.models.model_folders import ModelFolder
from resources.settings import TextEncoderSettings


class TextEncoder:
    """One text encoder of a project.

    Args:
        name: its name in the project.
        settings: its model, or the encoder whose text tower it uses.
        encoder: that encoder, if the settings name one.
    """

    def __init__(self, name: str, settings: TextEncoderSettings, encoder: Encoder | None = None) -> None:
        self.name = name
        self.settings = settings
        self._encoder = encoder

    def identity(self) -> dict[str, Any]:
        """Return what decides the vectors apart from the texts, as JSON values; the model is not loaded.

        Raises:
            EncoderError: its files are missing.
        """
        if self._encoder is not None:
            return {"encoder": self._encoder.identity()}
        return self._folder.weights

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts.

        Returns:
            float32 `[n, d]`, unit norm.

        Raises:
            EncoderError: the model cannot be loaded.
        """
        if self._encoder is not None:
            return self._by_text_tower(texts)
        found = self._model.encode(
            list(texts),
            batch_size=self.settings.batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(found, np.float32)

    def _by_text_tower(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        assert self._encoder is not None
        loaded = self._encoder.loaded
        parts = []
        with torch.inference_mode(), torch.autocast(loaded.device.type, loaded.autocast, loaded.autocast is not None):
            for start in range(0, len(texts), self.settings.batch_size):
                tokens = loaded.tokenizer(list(texts[start : start + self.settings.batch_size])).to(loaded.device)
                unit = torch.nn.functional.normalize(loaded.encode_text(tokens).float(), dim=-1)
                parts.append(unit.cpu().numpy())
        return np.concatenate(parts)

    @cached_property
    def _folder(self) -> ModelFolder:
        model = self.settings.model
        assert model is not None
        return ModelFolder(f"text encoder {self.name}", model, "modules.json", "a sentence-transformers model")

    @cached_property
    def _model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EncoderError(
                f"text encoder {self.name}: sentence-transformers is not installed. Remedy: pip install "
                "'clip-data-selection[sieve]', or an `encoder`, whose text tower is then used"
            ) from error
        device = None if self.settings.device == "auto" else self.settings.device
        folder = self._folder.path
        try:
            return SentenceTransformer(str(folder), device=device)
        except Exception as error:
            raise self._folder.cannot_load(error) from error
