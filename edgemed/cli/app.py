"""All commands under one Typer app, in the order of the help."""

from __future__ import annotations

from typing import Annotated

import typer

from edgemed.cli import ask, cases, chat, convert, data, demo, evaluate, finetune, judge, measure, models, pareto, plan

app = typer.Typer(
    name="edgemed",
    help="Medical vision-language models from checkpoint to answer, offline. Advises only; not for clinical use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from edgemed.core.versions import package_version

        typer.echo(f"edgemed {package_version('edgemed')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Options of every command."""


app.command("demo")(demo.demo)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(finetune.app, name="finetune")
app.command("convert")(convert.convert)
app.command("verify")(convert.verify)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("plan")(plan.plan)
app.command("bench")(measure.bench)
app.command("eval")(evaluate.evaluate)
app.command("judge")(judge.judge)
app.command("pareto")(pareto.pareto)
app.add_typer(cases.app, name="cases")
app.add_typer(cases.audit, name="audit")
