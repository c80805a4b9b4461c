"""Train the demo's encoder: `python -m examples.demo.train_encoder`.

A small CLIP (open_clip's model class and loss) learns from clean pairs that are in no pool. The weights in `encoder/`
come from this script with its defaults. A second run gives a model of the same quality. Equal bits are possible only on
the same machine with the same versions, because sums of floats depend on the processor and the threads.
"""

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from examples.demo.pictures import caption, draw, random_scene
from examples.demo.pool import jpeg_bytes

ENCODER = Path(__file__).parent / "encoder"
CONFIG = json.loads((ENCODER / "open_clip_config.json").read_text())
SEED = 1001  # not the pool's
CAPTIONS = 3  # wordings of each training picture
CHUNK = 500


def clean_pairs(part: str, chunk: int, side: int) -> tuple[np.ndarray, list[list[str]]]:
    """Draw `CHUNK` matched pairs; runs in worker processes.

    Args:
        part: `train` or `held-out`; the parts share no generator state.
        chunk: Number of the chunk within the part.
        side: Side of the encoder's input in pixels.

    Returns:
        uint8 pictures [CHUNK, side, side, 3], as decoded from JPEG and resized the way
        open_clip's preprocessing does, and `CAPTIONS` wordings of each.
    """
    pictures, captions = np.empty((CHUNK, side, side, 3), np.uint8), []
    for i in range(CHUNK):
        rng = Random(f"{part}/{SEED}/{chunk * CHUNK + i}")
        scene = random_scene(rng)
        stored = Image.open(BytesIO(jpeg_bytes(draw(scene, rng))))
        pictures[i] = np.asarray(stored.resize((side, side), Image.Resampling.BICUBIC))
        captions.append([caption(scene, rng) for _ in range(CAPTIONS)])
    return pictures, captions


def draw_pairs(part: str, n: int, side: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n pairs and return uint8 pictures [n, 3, side, side] and tokens [n, CAPTIONS, length]."""
    context = multiprocessing.get_context("spawn")
    chunks = n // CHUNK
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        drawn = list(executor.map(clean_pairs, [part] * chunks, range(chunks), [side] * chunks))
    pictures = torch.from_numpy(np.concatenate([p for p, _ in drawn])).permute(0, 3, 1, 2)
    texts = [text for _, captions in drawn for wordings in captions for text in wordings]
    tokens = open_clip.get_tokenizer(f"local-dir:{ENCODER}")(texts)
    return pictures, tokens.reshape(n, CAPTIONS, -1).to(torch.int32)


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Return bytes as the encoder's input: float32 with mean and deviation 0.5, channels last."""
    return (pictures.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def train(pictures: torch.Tensor, tokens: torch.Tensor, *, epochs: int, batch: int, rate: float) -> CLIP:
    """Train a model from scratch with open_clip's ClipLoss; each epoch uses another wording."""
    torch.manual_seed(SEED)
    model = CLIP(**CONFIG["model_cfg"]).to(memory_format=torch.channels_last)
    # Tokens that no training caption contains embed as zero, not at random.
    unread = torch.ones(model.vocab_size, dtype=torch.bool)
    unread[tokens.unique().long()] = False
    with torch.no_grad():
        model.token_embedding.weight[unread] = 0.0

    weights = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim > 1 and "embedding" not in n)]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    steps = epochs * (len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    clip_loss, step, began = open_clip.loss.ClipLoss(), 0, time.monotonic()
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(pictures)).split(batch):
            if len(rows) < batch:
                continue
            image, text, scale = model(normalise(pictures[rows]), tokens[rows, epoch % CAPTIONS].long())
            loss = clip_loss(image, text, scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, math.log(100.0))
            step += 1
            if step % 50 == 0 or step == steps:
                seconds = time.monotonic() - began
                print(
                    f"step {step}/{steps}  loss {loss.item():.3f}  temperature {1 / scale.item():.4f}  {seconds:.0f} s",
                    flush=True,
                )
    return model.eval()


def save(model: CLIP, path: Path) -> None:
    """Write the weights as float16 safetensors."""
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(half, path)


@torch.no_grad()
def retrieval(model: CLIP, pictures: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Return recall at 1, 5 and 10 in both directions among all pairs, first wording only."""
    image = torch.cat([model.encode_image(normalise(p), normalize=True) for p in pictures.split(250)])
    text = torch.cat([model.encode_text(t, normalize=True) for t in tokens[:, 0].long().split(250)])
    similarity = image @ text.T
    own = similarity.diagonal()
    ranks = {
        "image to text": (similarity > own[:, None]).sum(1),
        "text to image": (similarity > own[None, :]).sum(0),
    }
    return {f"{way} R@{k}": (rank < k).double().mean().item() for way, rank in ranks.items() for k in (1, 5, 10)}


def main() -> None:
    """Draw, train, save, load again through open_clip, and print held-out retrieval."""
    parser = argparse.ArgumentParser(description="Train the demo's encoder on clean pairs.")
    parser.add_argument("--pictures", type=int, default=60_000, help=f"a multiple of {CHUNK}")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ENCODER / "open_clip_model.safetensors")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    side = CONFIG["preprocess_cfg"]["size"]
    began = time.monotonic()
    pictures, tokens = draw_pairs("train", args.pictures, side, args.threads)
    print(f"{len(pictures)} training pairs drawn in {time.monotonic() - began:.0f} s", flush=True)
    model = train(pictures, tokens, epochs=args.epochs, batch=args.batch, rate=args.rate)
    save(model, args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    held_pictures, held_tokens = draw_pairs("held-out", 1_000, side, args.threads)
    stored = CLIP(**CONFIG["model_cfg"])
    open_clip.load_checkpoint(stored, str(args.out))
    print(f"temperature {1 / stored.logit_scale.exp().item():.4f}")
    for name, value in retrieval(stored.eval(), held_pictures, held_tokens).items():
        print(f"{name} among {len(held_pictures)}: {value:.3f}")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
