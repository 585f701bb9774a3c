"""Build llama.cpp's server as a peer to measure against, and models of random weights that both sides read.

    python tests/bench/build_peer.py FOLDER [--sdist FILE] [--models 135m,500m] [--jobs 2]
    python tests/bench/build_peer.py FOLDER --no-peer

The source is the tree that the PyPI sdist of llama-cpp-python vendors; it, the binary and the models stay in FOLDER,
outside the repository. What is there already is kept. In the end the server answers a prompt greedily from each model,
and transformers must agree with the probability of every token: only then is it the same model on both sides. Needs
cmake, ninja and a C++ compiler. With --no-peer it makes the models alone, FOLDER/models/135m and 500m, in a minute:
enough for all benchmarks that compare with no other server.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from peer_models import SHAPES, make_folder, make_gguf
from transformers import AutoModelForCausalLM

PACKAGE = "llama-cpp-python==0.3.36"
DOCS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
CMAKE_FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # this processor's own instructions
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
}
MAX_LOGPROB_ERROR = 0.1
"""Between bfloat16 on one side and float32 over the same weights on the other; another model is off by whole units."""


def fetch(folder: Path) -> Path:
    """Download the sdist."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack the sdist once; the root of llama.cpp in it."""
    root = folder / sdist.name.removesuffix(".tar.gz")
    if not root.exists():
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
    return root / "vendor" / "llama.cpp"


def build(llama_cpp: Path, folder: Path, jobs: int) -> Path:
    """Build `llama-server`, behind everything else that this machine does; its path."""
    flags = [f"-D{name}={value}" for name, value in CMAKE_FLAGS.items()]
    subprocess.run(["cmake", "-S", llama_cpp, "-B", folder, "-G", "Ninja", *flags], check=True)
    subprocess.run(["nice", "-n", "15", "ninja", "-C", folder, f"-j{jobs}", "llama-server"], check=True)
    return folder / "bin" / "llama-server"


@contextmanager
def serving(binary: Path, gguf: Path, port: int) -> Iterator[str]:
    """The server on this model, until the block ends."""
    command = [binary, "-m", gguf, "--host", "127.0.0.1", "--port", str(port), "-c", "512", "-np", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_up(url):
            if process.poll() is not None:
                raise SystemExit(f"{binary} ended with {process.returncode} on {gguf}; port {port} may be in use")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


@torch.no_grad()
def check_same_model(url: str, folder: Path) -> float:
    """The largest difference in log-probability over a greedy answer of the peer, transformers following it.

    Raises:
        SystemExit: The peer's numbers are not those of the model in `folder`.
    """
    prompt = torch.randint(3, 2000, (96,), generator=torch.Generator().manual_seed(1)).tolist()
    body = {"prompt": prompt, "n_predict": 32, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    answer = httpx.post(f"{url}/completion", json=body, timeout=300).raise_for_status().json()
    chosen = [token["id"] for token in answer["completion_probabilities"]]
    theirs = torch.tensor([token["logprob"] for token in answer["completion_probabilities"]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
    ours = logits.log_softmax(-1).gather(-1, torch.tensor(chosen)[:, None])[:, 0]
    error = (ours - theirs).abs().max().item()
    if len(chosen) != 32 or error > MAX_LOGPROB_ERROR:
        raise SystemExit(f"{url} does not serve {folder}: log-probabilities differ by up to {error:.2f}")
    return error


def main() -> None:
    """Build, make the models, check them, and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes; outside the repository")
    parser.add_argument("--sdist", type=Path, help=f"a downloaded sdist; default: pip downloads {PACKAGE}")
    parser.add_argument("--models", default=",".join(SHAPES), help="which of the shapes (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes (default: %(default)s)")
    parser.add_argument("--port", type=int, default=18180, help="for the check (default: %(default)s)")
    parser.add_argument("--no-peer", action="store_true", help="only the models, and these for Macaw")
    args = parser.parse_args()
    if unknown := set(args.models.split(",")) - set(SHAPES):
        parser.error(f"unknown shapes {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.no_peer:
        for name in args.models.split(","):
            folder = args.folder / "models" / name
            if not (folder / "model.safetensors").exists():
                make_folder(SHAPES[name], folder, DOCS)
            print(f"model  {folder}")
        return
    llama_cpp = unpack(args.sdist or fetch(args.folder), args.folder)
    binary = build(llama_cpp, args.folder / "build", args.jobs)
    print(f"peer   {binary}")
    for name in args.models.split(","):
        folder, gguf = args.folder / "models" / name, args.folder / "models" / f"{name}.gguf"
        if not gguf.exists():  # written last
            make_folder(SHAPES[name], folder, DOCS)
            make_gguf(llama_cpp, folder, gguf)
        with serving(binary, gguf, args.port) as url:
            error = check_same_model(url, folder)
        print(f"model  {folder} and {gguf}: the same, log-probabilities within {error:.3f}")


if __name__ == "__main__":
    main()
