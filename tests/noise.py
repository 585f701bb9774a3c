"""A model of noise that is served as `macaw-demo`: the same shape with random weights, which a seed decides.

Its answers end only where they must, so that tests say how long they are, and every token of a prompt changes them. Its
tokenizer was trained on this project's docs.
"""

from pathlib import Path

NOISE = {
    "model": str(Path(__file__).with_name("noise_model")),
    "served_model_name": "macaw-demo",
    "load_format": "dummy",
}
