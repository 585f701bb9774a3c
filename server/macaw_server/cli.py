"""The `macaw` command: `serve` and `bench`; other packages add theirs by the entry point group ``macaw.commands``."""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Annotated, Any, Literal, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from typer.core import TyperGroup

from macaw_server.bench.command import bench
from macaw_server.config import ServerConfig
from macaw_server.errors import ConfigError, StartupError
from macaw_server.kernels_cli import app as kernels_app
from macaw_server.simulate.command import simulate
from macaw_server.traces.command import trace


class _Commands(TyperGroup):
    """Own commands, and those of other packages, which load when they are called: LangChain takes seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return [*super().list_commands(ctx), *(entry.name for entry in _plugins())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, or None."""
        for entry in _plugins():
            if entry.name == cmd_name:
                return _load(entry)
        return super().get_command(ctx, cmd_name)


def _plugins() -> EntryPoints:
    return entry_points(group="macaw.commands")


def _load(entry: EntryPoint) -> Any:
    plugin = typer.Typer(add_completion=False)
    try:
        plugin.command(name=entry.name)(entry.load())
    except ModuleNotFoundError as e:
        package = e.name

        @plugin.command(name=entry.name, help=f"Not installed: it needs the package {package}.")
        def missing() -> None:
            typer.echo(f"error: `macaw {entry.name}` needs the package {package}: pip install 'macaw[all]'", err=True)
            raise typer.Exit(1)

    return typer.main.get_command(plugin)


app = typer.Typer(
    name="macaw",
    cls=_Commands,
    help="Serve LLM applications: programs of many calls, scheduled end to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps `serve` a sub-command even when it is the only one."""


def serve(**flags: Any) -> None:
    """Serve MODEL over HTTP: OpenAI's endpoints, and programs."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        config = _config(flags)
        from macaw_server.serve import run_server  # a wrong flag is said before this is loaded

        run_server(config, console)
    except StartupError as e:
        console.print(f"[red]error:[/] {type(e).__name__}: ", e, sep="", markup=True, style=None)
        raise typer.Exit(2 if isinstance(e, ConfigError) else 1) from e


def _config(flags: dict[str, Any]) -> ServerConfig:
    """Flags win over ``MACAW_*`` variables, which win over defaults.

    Raises:
        ConfigError: Each wrong flag or variable by name, with what was seen and what is accepted.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    try:
        return ServerConfig(**given)
    except ValidationError as e:
        lines = []
        for error in e.errors():
            name = str(error["loc"][0]) if error["loc"] else ""
            source = _flag(name) if name in given else f"MACAW_{name.upper()}"
            lines.append(f"{source}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(lines)) from e


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name != "model" else "MODEL"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One typer parameter for one field of the configuration; pydantic does the parsing, so most are strings."""
    default = "" if field.default in (None, ()) else f" (default: {field.default})"
    text = f"{field.description}{default}"
    kind: Any = field.annotation
    flag = _flag(name)
    if kind in (bool, bool | None):
        kind, flag = bool, f"{flag}/--no-{flag[2:]}"
    elif get_origin(kind) is tuple:
        kind = list[str]
    elif get_origin(kind) is not Literal:
        kind = str
    metavar = "VALUE" if kind in (str, list[str]) else None
    spec = typer.Argument(help=text) if name == "model" else typer.Option(flag, help=text, metavar=metavar)
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD if name == "model" else inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, spec],
    )


def _derive(command: Any, config: type[ServerConfig]) -> Any:
    """Give `command` one flag for each field, so that flags and configuration cannot drift apart."""
    order = sorted(config.model_fields.items(), key=lambda item: item[0] != "model")
    command.__signature__ = inspect.Signature([_parameter(name, field) for name, field in order])
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}
    return command


app.command()(_derive(serve, ServerConfig))
app.add_typer(bench)
app.add_typer(kernels_app)
app.add_typer(simulate)
app.add_typer(trace)
