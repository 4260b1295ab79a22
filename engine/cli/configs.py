"""The commands that only read configs: validate, explain, diff, schema."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from redline.cli.arguments import arg, command, positive
from redline.console import rows_as_text, terminal
from redline.errors import ConfigError

__all__ = ["diff", "explain", "schema", "validate"]


@command(
    arg("configs", nargs="+", metavar="CONFIG", help="config files, DeepSpeed's JSON; - reads standard input"),
    arg("--world-size", type=positive, metavar="N", help="check batch sizes for N ranks"),
    arg("--samples", type=positive, metavar="N", help='samples of the training data, for a total_num_steps of "auto"'),
    arg("--schema", metavar="POLICY.json", help="check this JSON Schema, with rules of your own, as well"),
    arg("--json", action="store_true", help="print a JSON object; a list of them for several configs"),
    arg("--effective", action="store_true", help="print every value in force as well, with its origin"),
)
def validate(options: argparse.Namespace) -> int:
    """Check configs: every problem, and the status of every key.

    Exit code: 0 runs as written, 1 invalid, 2 wrong command line, 3 valid DeepSpeed that asks for something that is not
    supported here. Of several configs the worst counts: 1, then 3, then 0.

    examples:
      redline validate ds_config.json
      redline validate ds_config.json --world-size 8 --json
      redline validate ds_config.json --samples 50000   # with redline.epochs and "total_num_steps": "auto"
      python make_config.py | redline validate -
    """
    from redline.config import origins, validate

    sources = [sys.stdin if name == "-" else Path(name) for name in options.configs]
    reports = [
        validate(source, world_size=options.world_size, num_samples=options.samples, policy=options.schema)
        for source in sources
    ]
    if options.json:
        values = [report.to_json() for report in reports]
        for value, report in zip(values, reports):
            if options.effective and report.config is not None:
                value["origins"] = origins(report.config)
        print(json.dumps(values[0] if len(values) == 1 else values, indent=2))
    else:
        print("\n\n".join(report.to_text(*terminal(), whole=options.effective) for report in reports))
    # Of several configs, one that is invalid counts more than one that asks for what is not built.
    codes = {report.exit_code for report in reports}
    return 1 if 1 in codes else max(codes)


@command(arg("key", nargs="?", default="", metavar="KEY", help="the key to explain"))
def explain(options: argparse.Namespace) -> int:
    """Explain a config key: its meaning, values, default and status.

    KEY is a path, its last part, a pattern, or a word, which lists the keys that contain it; of a section all
    keys in it are listed. Without KEY: all top-level keys.

    examples:
      redline explain zero_optimization.stage
      redline explain cycle_min_lr
      redline explain warmup
      redline explain 'zero_optimization.offload*'
    """
    from redline.config.explain import explain

    print(explain(options.key, *terminal()))
    return 0


@command(
    arg("first", metavar="A", help="a config file"),
    arg("second", metavar="B", help="another one"),
    arg("--world-size", type=positive, metavar="N", help="infer batch sizes for N ranks"),
)
def diff(options: argparse.Namespace) -> int:
    """Compare two configs as they are in force.

    Defaults count, spelling and comments do not: two files that train alike have no difference.

    example:
      redline diff ds_config.json range_test/one_cycle.json
    """
    from redline.config import differences, validate

    configs = []
    for name in (options.first, options.second):
        # Not load_config: a config that asks for what is not built can be compared, too.
        report = validate(name, world_size=options.world_size)
        if report.config is None:
            raise ConfigError(report.errors, report.source)
        configs.append(report.config)
    found = differences(*configs)
    rows = [(path, *("-" if value is None else str(value) for value in values)) for path, *values in found]
    heads = ("key", options.first, options.second)
    print("\n".join(rows_as_text(rows, heads, *terminal())) if rows else "no difference")
    return 0


@command()
def schema(options: argparse.Namespace) -> int:
    """Print the JSON Schema of configs, for editors.

    Save it and name it in a config as "$schema"; editors then complete keys and underline mistakes.

    example:
      redline schema > schema.json
    """
    from redline.config import build_schema

    print(json.dumps(build_schema(), indent=2))
    return 0
