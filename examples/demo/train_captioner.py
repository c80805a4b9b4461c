"""Train the demo's captioner: `python -m examples.demo.train_captioner`.

A small CoCa (open_clip's model class and loss) learns to describe clean pictures that are in no pool. The weights in
`captioner/` come from this script with its defaults. A second run gives a model of the same quality, but not the same
bits.

The domain has about a hundred words, open_clip's tokenizer 49,408. So the model trains with the words that occur, and
gets the other rows of its two vocabulary matrices afterwards, such that they are never generated. These matrices are
stored as 8-bit floats, which open_clip's loader widens like any other.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import open_clip
import torch
from open_clip.coca_model import CoCa
from safetensors.torch import save_file

from examples.demo.train_encoder import CAPTIONS, CHUNK, SEED, draw_pairs, normalise

CAPTIONER = Path(__file__).parent / "captioner"
CONFIG = json.loads((CAPTIONER / "open_clip_config.json").read_text())
VOCABULARY = ("text.token_embedding.weight", "text_decoder.text_projection")
NEVER = -30.0  # logit of a word that was never read


def model_config(words: int) -> dict[str, object]:
    """Return the arguments of a CoCa with a vocabulary of `words` tokens."""
    config = copy.deepcopy(CONFIG["model_cfg"])
    del config["custom_text"]
    config["text_cfg"]["vocab_size"] = config["multimodal_cfg"]["vocab_size"] = words
    return config


def new_model(words: int) -> CoCa:
    """Return a model whose last feature before the vocabulary is always one, so that each word has a bias."""
    model = CoCa(**model_config(words))
    decoder = model.text_decoder
    with torch.no_grad():
        for block in [*decoder.resblocks, *decoder.cross_attn]:
            for weight in (block.attn.out_proj.weight, block.mlp.c_proj.weight):
                weight.mul_(0.5)
        torch.nn.init.normal_(decoder.text_projection, std=decoder.text_projection.shape[0] ** -0.5)
        decoder.text_projection[-1] = 0.0
    _hold(model)
    return model


@torch.no_grad()
def _hold(model: CoCa) -> None:
    model.text_decoder.ln_final.weight[-1] = 0.0
    model.text_decoder.ln_final.bias[-1] = 1.0


def train(pictures: torch.Tensor, tokens: torch.Tensor, *, epochs: int, batch: int, rate: float) -> CoCa:
    """Train a model from scratch with open_clip's CoCaLoss; each epoch uses another wording.

    Args:
        pictures: uint8 [n, 3, side, side].
        tokens: [n, wordings, length], numbered by the words that occur; 0 is no word.
        epochs: Number of passes over the pictures.
        batch: Pictures per step.
        rate: Largest learning rate.
    """
    torch.manual_seed(SEED)
    model = new_model(int(tokens.max()) + 1)
    weights = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n and "query" not in n]
    kept = {id(p) for p in weights}
    others = [p for p in model.parameters() if id(p) not in kept]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    steps = epochs * (len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    coca_loss, step, began = open_clip.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5), 0, time.monotonic()
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(pictures)).split(batch):
            if len(rows) < batch:
                continue
            words = tokens[rows, epoch % CAPTIONS].long()
            words = words[:, : int((words != 0).sum(1).max())]
            found = model(normalise(pictures[rows]), words)
            contrast, said = coca_loss(**{name: found[name] for name in _LOSS})
            optimizer.zero_grad()
            (contrast + said).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            _hold(model)
            step += 1
            if step % 50 == 0 or step == steps:
                seconds = time.monotonic() - began
                print(
                    f"step {step}/{steps}  contrastive {contrast.item():.3f}  {said.item() / 2:.3f} nats a word  "
                    f"{seconds:.0f} s",
                    flush=True,
                )
    return model.eval()


_LOSS = ("image_features", "text_features", "logits", "labels", "logit_scale")


def widen(model: CoCa, known: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a model's weights with open_clip's whole vocabulary.

    Args:
        model: A model trained with the tokens `known`, in this order.
        known: int64 [words], ids of open_clip's tokenizer.
    """
    words = CONFIG["model_cfg"]["text_cfg"]["vocab_size"]
    state = model.state_dict()
    embedding, projection = (state[name] for name in VOCABULARY)
    wide = torch.zeros(words, embedding.shape[1])
    wide[known] = embedding
    state[VOCABULARY[0]] = wide
    wide = torch.zeros(projection.shape[0], words)
    wide[-1] = NEVER
    wide[:, known] = projection
    wide[:, 0] = 0.0  # no word: the labels never ask for it, so what was learned there means nothing
    wide[-1, 0] = NEVER
    state[VOCABULARY[1]] = wide
    return state


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write the weights as float16 safetensors, the vocabulary as float8."""
    dtypes = dict.fromkeys(VOCABULARY, torch.float8_e4m3fn)
    save_file({name: value.to(dtypes.get(name, torch.float16)).contiguous() for name, value in state.items()}, path)


@torch.no_grad()
def nats_per_word(model: CoCa, pictures: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the mean loss per word of held-out pictures, first wording only."""
    coca_loss, total, parts = open_clip.loss.CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0), 0.0, 0
    for some, words in zip(pictures.split(250), tokens[:, 0].long().split(250), strict=True):
        found = model(normalise(some), words)
        total, parts = total + coca_loss(**{name: found[name] for name in _LOSS})[1].item(), parts + 1
    return total / parts


def main() -> None:
    """Draw, train, save, load again through open_clip, and print the loss on held-out pictures."""
    parser = argparse.ArgumentParser(description="Train the demo's captioner on clean pairs.")
    parser.add_argument("--pictures", type=int, default=16_000, help=f"a multiple of {CHUNK}")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=CAPTIONER / "open_clip_model.safetensors")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    side = CONFIG["preprocess_cfg"]["size"]
    began = time.monotonic()
    pictures, tokens = draw_pairs("train", args.pictures, side, args.threads)
    known, numbered = torch.cat([torch.zeros(1, dtype=tokens.dtype), tokens.flatten()]).unique(return_inverse=True)
    numbered = numbered[1:].reshape(tokens.shape)
    print(f"{len(pictures)} pictures, {len(known)} words, {time.monotonic() - began:.0f} s", flush=True)
    model = train(pictures, numbered, epochs=args.epochs, batch=args.batch, rate=args.rate)
    save(widen(model, known.long()), args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    held_pictures, held_tokens = draw_pairs("held-out", 1_000, side, args.threads)
    stored = open_clip.create_model(f"local-dir:{args.out.parent}") if args.out.parent == CAPTIONER else None
    if stored is not None:
        print(f"{nats_per_word(stored.eval(), held_pictures, held_tokens):.3f} nats per word on 1000 held-out pictures")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
