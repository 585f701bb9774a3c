"""``macaw kernels``: whether the kernels are right here, what they take elsewhere, and what they cost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from macaw_kernels import HeadConfig

app = typer.Typer(name="kernels", help="Check, compile and measure the attention kernels.", no_args_is_help=True)

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


@app.command()
def check(device: Device = "cpu") -> None:
    """Compare every backend of this device with the reference."""
    import torch

    from macaw_kernels.check import check_backends

    failed = 0
    for result in check_backends(torch.device(device)):
        failed += not result.passed
        verdict = "ok" if result.passed else "FAILED"
        typer.echo(
            f"{result.backend:8} {result.case:46} error {result.error:.2e} (limit {result.limit:.2e})  {verdict}"
        )
    if failed:
        raise typer.Exit(1)


@app.command("compile")
def compile_(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; all by default.")] = None,
    fast: Annotated[bool, typer.Option(help="Only without features and with all of them.")] = False,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here; what spills or does not fit is an error."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("TRITON_INTERPRET=1 compiles nothing; unset it")
    try:
        from macaw_kernels.triton.compile import TARGETS, compile_variant, variants
    except ModuleNotFoundError as e:
        raise typer.BadParameter(f"it needs the package {e.name}: pip install 'macaw[gpu]'") from e
    chosen = tuple(target or TARGETS)
    if unknown := set(chosen) - set(TARGETS):
        raise typer.BadParameter(f"unknown target {', '.join(sorted(unknown))}; one of {', '.join(TARGETS)}")
    typer.echo("target  kernel  dtype  head_dim  registers  spills  shared KiB  features")
    failed = 0
    for variant in variants(chosen, all_features=not fast):
        took = compile_variant(variant)
        failed += not took.sound
        features = "+".join(name.removeprefix("HAS_").lower() for name in variant.features) or "-"
        typer.echo(
            f"{variant.target:7} {variant.kernel:7} {variant.dtype:6} {variant.head_dim:8} {took.registers:10} "
            f"{took.spills:7} {took.shared_bytes / 1024:11.1f}  {features}{'' if took.sound else '  FAILED'}"
        )
    if failed:
        typer.echo(f"error: {failed} variants spill or do not fit", err=True)
        raise typer.Exit(1)


@app.command()
def fit(
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    heads: Annotated[
        list[str] | None, typer.Option(help="query heads : KV heads x head dim; may be given again. Default: 14:2x64.")
    ] = None,
    tiles: Annotated[
        bool | None, typer.Option("--tiles/--no-tiles", help="Time tile shapes first (minutes). Default: on a GPU.")
    ] = None,
) -> None:
    """Measure the planner's cost model, and on a GPU tile shapes, and keep them in files, which the engine reads."""
    import torch

    from macaw_kernels.fit import fit_profile

    on, kind = torch.device(device), _dtype(dtype)
    shapes = [_heads(text) for text in heads or ["14:2x64"]]
    if tiles and on.type == "cpu":
        raise typer.BadParameter("--tiles needs --device cuda: a CPU has no tile shapes")
    if tiles or (tiles is None and on.type == "cuda"):
        from macaw_kernels.triton.tune import tune

        for shape in {(each.head_dim, each.v_head_dim): each for each in shapes}.values():
            tuned = tune(shape, on, kind)
            typer.echo(f"{tuned.config}\n{tuned.gain:.2f}x as fast as built in; {tuned.num_timed} were timed")
            typer.echo(f"written to {tuned.path}")
    for shape in shapes:
        fitted = fit_profile(on, kind, shape)
        typer.echo(f"{fitted.profile}\nmedian error of the model over {fitted.num_points} points: {fitted.error:.0%}")
        typer.echo(f"written to {fitted.path}")


@app.command()
def bench(
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    heads: Annotated[str, typer.Option(help="CPU: query heads : KV heads x head dim; GPUs have a table.")] = "14:2x64",
    backend: Annotated[str | None, typer.Option(help="triton, native or torch; default: the best.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of each case.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
) -> None:
    """Time a decode step with sharing against the same without, in alternation, per layer."""
    import torch

    from macaw_kernels import best_backend
    from macaw_kernels.bench import copy_gb_s, cpu_cases, gpu_cases, run_case

    if threads:
        torch.set_num_threads(threads)
    on, kind = torch.device(device), _dtype(dtype)
    limit = copy_gb_s(on)
    cases = list(gpu_cases() if on.type == "cuda" else cpu_cases(_heads(heads)))
    chosen = backend or best_backend(cases[0].heads, on, kind)
    typer.echo(f"{chosen} on {device}, {dtype}, {torch.get_num_threads()} threads; a copy moves {limit:.1f} GB/s")
    typer.echo(
        "heads      nodes_tokens            plain ms  shared ms  gain (least - most)    items  plain GB/s  roofline"
    )
    for case in cases:
        each = run_case(case, on, kind, limit, rounds, backend)
        gain, least, most = each.gain
        typer.echo(
            f"{case.heads.name:10} {case.name:22} {each.plain_ms:9.3f} "
            f"{each.shared_ms:10.3f}  {gain:5.2f} ({least:5.2f} - {most:5.2f}) {each.num_shared:8} "
            f"{each.plain_gb_s:11.1f} {each.roofline:9.0%}"
        )


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"dtype is {name!r}; float32, bfloat16 or float16")
    found: torch.dtype = getattr(torch, name)
    return found


def _heads(text: str) -> HeadConfig:
    from macaw_kernels import HeadConfig

    try:
        num_q_heads, rest = text.split(":")
        num_kv_heads, head_dim = rest.split("x")
        return HeadConfig(int(num_q_heads), int(num_kv_heads), int(head_dim), int(head_dim))
    except ValueError as e:
        raise typer.BadParameter(f"heads is {text!r} ({e}); like 14:2x64") from e
