"""The commands and what they take. What a command needs is imported inside its function."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["Options", "app"]

app = typer.Typer(
    name="vamo-ft",
    help="Fine-tune Hugging Face language models from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as method.probes=4; may be repeated."),
]

NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Tokenize the data anew, and keep nothing of it for other runs.")
]


@dataclass(slots=True)
class Options:
    """What holds for every command."""

    debug: bool = False
    ends_process: bool = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from vamo_ft import __version__

        print(f"vamo-ft {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print tracebacks of errors; may stand after the command, too.")
    ] = False,
) -> None:
    context.obj.debug = debug


@app.command("train")
def _train(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="Continue from the newest checkpoint, from none, or from PATH."),
    ] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Use a new run directory if the first one is taken.")] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="With --resume PATH: continue with other settings, as far as they fit."),
    ] = False,
    no_cache: NoCache = False,
) -> None:
    """Train, or continue where the run stopped."""
    from vamo_ft.commands.settings import load_settings

    load = cache(lambda: load_settings(config, overrides=overrides or []))
    if os.environ.get("WORLD_SIZE", "1") == "1":
        load()  # several processes connect first, so that one of them says what is wrong
    from vamo_ft.commands.train import train

    train(
        load,
        resume=resume,
        fresh=fresh,
        allow_changes=allow_changes,
        use_cache=not no_cache,
        ends_process=context.obj.ends_process,
    )


@app.command("validate")
def _validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a configuration. Prints every key with its value and where that comes from; loads no torch."""
    from vamo_ft.commands.validate import validate

    validate(config, overrides=overrides or [])


@app.command("preview")
def _preview(
    config: ConfigFile,
    samples: Annotated[int, typer.Option("-n", "--samples", min=0, help="How many training samples to show.")] = 3,
    overrides: Overrides = None,
    no_cache: NoCache = False,
) -> None:
    """Show training samples as tokens. Marks what is learnt, and tells lengths, what is cut, and steps."""
    from vamo_ft.commands.settings import load_settings

    settings = load_settings(config, overrides=overrides or [])
    from vamo_ft.commands.preview import preview

    preview(settings, samples=samples, use_cache=not no_cache)


@app.command("plan")
def _plan(
    config: ConfigFile,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Fit it to this GPU, such as h100-80gb or rtx4090; default: what is here."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=1024, help="Plan one of so many processes with a device each (the world size)."
        ),
    ] = 1,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Set these methods beside the file's; default: all.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(metavar="X", min=1e-9, help="Speed of such a run, as its log tells it.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load the model and time some steps.")] = False,
    overrides: Overrides = None,
    no_cache: NoCache = False,
) -> None:
    """Say what memory, work, time and disk a run needs, and whether it fits; reads no weights."""
    from vamo_ft.commands.settings import load_settings

    settings = load_settings(config, overrides=overrides or [])
    from vamo_ft.commands.plan import plan

    plan(
        settings,
        gpu=gpu,
        processes=processes,
        methods=methods,
        tokens_per_second=tokens_per_second,
        measure=measure,
        use_cache=not no_cache,
    )


@app.command("evaluate")
def _evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run directory or a checkpoint in it.")],
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Another data set with the same columns.")] = None,
    no_cache: NoCache = False,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what the model answers to each sample, as JSON lines.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness, in place of the run's data.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: samples of each.")] = None,
    overrides: Overrides = None,
) -> None:
    """Print loss and scores of a trained model. On the run's held-out data, another data set, or public benchmarks."""
    from vamo_ft.commands.settings import find_run, load_settings

    config, model = find_run(target)
    settings = load_settings(config, overrides=overrides or [])
    if tasks is not None or limit is not None:
        from vamo_ft.commands.harness import evaluate_tasks

        evaluate_tasks(settings, model=model, tasks=tasks, limit=limit, data=data, predictions=predictions)
        return
    from vamo_ft.commands.evaluate import evaluate

    evaluate(settings, model=model, data=data, use_cache=not no_cache, predictions=predictions)


@app.command("diagnose")
def _diagnose(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; default <output_dir>/<run name>-diagnose.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Held-out samples whose gradients are taken one by one.")] = 64,
    steps: Annotated[int, typer.Option(min=0, help="Training steps before the measurements, in memory only.")] = 64,
    batches: Annotated[int, typer.Option(min=8, help="Held-out batches whose variance is measured.")] = 32,
    no_cache: NoCache = False,
) -> None:
    """Measure whether the correction pays. Noise floor, variance and cost, on your own model and data."""
    from vamo_ft.commands.settings import load_settings

    settings = load_settings(config, overrides=overrides or [])
    from vamo_ft.commands.diagnose import diagnose

    diagnose(settings, out=out, samples=samples, steps=steps, batches=batches, use_cache=not no_cache)


@app.command("compare")
def _compare(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="What to compare; default: what the file's section names.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT", help="Of each run: '20000 evaluations', '3e14 flops', '100k tokens', '600 seconds'."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|A,B,...", help="Their number, or the seeds themselves.")
    ] = None,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=A,B,...", help="Candidates of one method; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; default <output_dir>/<run name>-compare.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Use a new folder if the first one is taken.")] = False,
    no_cache: NoCache = False,
) -> None:
    """Compare methods at equal compute. Learning rates chosen for each, several seeds, intervals and verdicts."""
    from vamo_ft.commands.settings import load_comparison

    loaded = load_comparison(
        config, overrides=overrides or [], methods=methods, budget=budget, seeds=seeds, rates=learning_rates or []
    )
    from vamo_ft.commands.compare import compare

    compare(loaded, out=out, fresh=fresh, use_cache=not no_cache, ends_process=context.obj.ends_process)


@app.command("export")
def _export(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run directory or a checkpoint in it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is new or empty.")],
    from_seedlog: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Rebuild the weights from this base model and the run's seedlog.bin alone."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --from-seedlog: after the first N steps.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Precision of a whole model's weights; default: that of the run."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest file of weights, such as 500MB; default 5GB.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hub as well.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: make a private repository.")] = False,
    overrides: Overrides = None,
) -> None:
    """Write a plain Hugging Face folder. The model, the adapter, or both merged."""
    from vamo_ft.commands.settings import find_run, find_seed_log, load_settings

    config, source = find_run(target) if from_seedlog is None else find_seed_log(target)
    settings = load_settings(config, overrides=overrides or [])
    from vamo_ft.commands.export import export

    export(
        settings,
        source=source,
        out=out,
        base=from_seedlog,
        steps=steps,
        merge=merge,
        dtype=dtype,
        max_shard_size=max_shard_size,
        push_to_hub=push_to_hub,
        private=private,
    )


@app.command("generate")
def _generate(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a checkpoint in it, a model's folder or a Hub id.")
    ],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="What to continue; - reads from standard input.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most probable token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the most probable tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what is drawn.")] = 0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="In the chat template, or as it is; default: as in training.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print what a model answers. Token by token, to each prompt."""
    from vamo_ft.commands.settings import find_subject

    subject = find_subject(target, overrides=overrides or [])
    from vamo_ft.commands.generate import generate

    generate(
        subject,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
    )


@app.command("report")
def _report_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; default RUN/report.html, or report.html here for several runs."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the pictures as PNG files to this folder too.")
    ] = None,
) -> None:
    """Write one page on one or several runs. Results, pictures, and what differs between their configurations."""
    from vamo_ft.commands.report import report

    report(runs, out=out, png=png)


@app.command("methods")
def _methods() -> None:
    """List the methods. What each costs per step, and what it holds in memory."""
    from vamo_ft.commands.methods import methods

    methods()


@app.command("init")
def _init(
    method: Annotated[
        str, typer.Option(metavar="NAME", help="One of the names that 'vamo-ft methods' lists.")
    ] = "vamo",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write.")] = Path("config.yaml"),
    model: Annotated[
        str, typer.Option(metavar="PATH", help="Hub id, folder or .gguf file.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Your file; its columns tell the format. Default: SST-2.")
    ] = None,
) -> None:
    """Write a commented configuration that trains as it is."""
    from vamo_ft.commands.init import init

    init(method=method, out=out, model=model, data=data)
