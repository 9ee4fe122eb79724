"""Put trained weights and their card into the package.

    python benchmarks/weights.py RUN/step-0000000528.pt card.toml

The card has the fields of `lsag.weights.Card` but the digest. The last step's checkpoint is what a training ends with;
best.pt would be chosen by the images that it is evaluated on. Optional third argument: the dataset by its name, for
weights that were trained on a folder of its images.
"""

import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch

from lsag.checkpoint import load_checkpoint, save_safetensors
from lsag.presets import load_preset
from lsag.weights import FILES, card_of

checkpoint, card, *dataset = sys.argv[1:]
found = load_checkpoint(checkpoint)
found = replace(found, preset=load_preset(found.preset, dataset=dataset[0] if dataset else None))
file = FILES / f"{found.preset.name}.safetensors"
FILES.mkdir(exist_ok=True)
save_safetensors(file, found)
with safetensors.safe_open(file, "pt") as opened:
    digest = opened.metadata()["lsag_sha256"]
file.with_suffix(".toml").write_text(f'{Path(card).read_text("utf-8")}digest = "{digest}"\n', "utf-8")
print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, top-1 {found.metrics['top1']:.2%}; card {card_of(file)}")
