"""The models of a project by name. A model is loaded when it first computes something, once a process."""

from collections.abc import Mapping

from resources.models.captioners import Captioner
from resources.models.encoders import Encoder
from resources.models.text_encoders import TextEncoder
from resources.settings import CaptionerSettings, EncoderSettings, TextEncoderSettings


class Models:
    """Encoders, captioners and text encoders by name.

    Args:
        encoders: settings of each encoder.
        captioners: settings of each captioner.
        text_encoders: settings of each text encoder.
    """

    def __init__(
        self,
        encoders: Mapping[str, EncoderSettings],
        captioners: Mapping[str, CaptionerSettings] | None = None,
        text_encoders: Mapping[str, TextEncoderSettings] | None = None,
    ) -> None:
        self._encoder_settings = encoders
        self._captioner_settings = captioners or {}
        self._text_encoder_settings = text_encoders or {}
        self._encoders: dict[str, Encoder] = {}
        self._captioners: dict[str, Captioner] = {}
        self._text_encoders: dict[str, TextEncoder] = {}

    def encoder(self, name: str) -> Encoder:
        """Return an encoder."""
        if name not in self._encoders:
            self._encoders[name] = Encoder(name, self._encoder_settings[name])
        return self._encoders[name]

    def captioner(self, name: str) -> Captioner:
        """Return a captioner."""
        if name not in self._captioners:
            self._captioners[name] = Captioner(name, self._captioner_settings[name])
        return self._captioners[name]

    def text_encoder(self, name: str) -> TextEncoder:
        """Return a text encoder; one that uses an encoder's text tower shares that encoder's model."""
        if name not in self._text_encoders:
            settings = self._text_encoder_settings[name]
            encoder = self.encoder(settings.encoder) if settings.encoder is not None else None
            self._text_encoders[name] = TextEncoder(name, settings, encoder)
        return self._text_encoders[name]
