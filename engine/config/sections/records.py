"""What a run writes down: ``tensorboard``, ``wandb``, ``csv_monitor``, ``comet``, ``flops_profiler``,
``comms_logger``, ``timers``.

After `deepspeed/monitor/config.py`, `profiling/config.py`, `comm/config.py` and `utils/config.py`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from engine.config.section import TO_DEFAULT, Index, Integer, Loose, NonNegative, Rare

__all__ = [
    "CometConfig",
    "CommsLoggerConfig",
    "CsvMonitorConfig",
    "FlopsProfilerConfig",
    "TensorBoardConfig",
    "ThroughputConfig",
    "TimersConfig",
    "WandbConfig",
]


class _Monitor(Rare):
    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}

    enabled: bool = Field(False, description="Write to it.")


class TensorBoardConfig(_Monitor):
    """Event files for TensorBoard."""

    output_path: str = Field("", description="Folder; empty for the script's own.")
    job_name: str = Field("DeepSpeedJobName", description="Folder within output_path.")


class CsvMonitorConfig(_Monitor):
    """One CSV file for each number."""

    output_path: str = Field("", description="Folder; empty for the script's own.")
    job_name: str = Field("DeepSpeedJobName", description="Folder within output_path.")


class WandbConfig(_Monitor):
    """Weights & Biases."""

    group: str | None = Field(None, description="Group of runs.")
    team: str | None = Field(None, description="Team that owns the run.")
    project: str = Field("deepspeed", description="Project of the run.")


class CometConfig(_Monitor):
    """Comet."""

    samples_log_interval: Integer = Field(100, description="Samples between two records.")
    project: str | None = Field(None, description="Project of the run.")
    workspace: str | None = Field(None, description="Workspace of the project.")
    api_key: str | None = Field(None, description="Key of the account; rather set COMET_API_KEY.")
    experiment_name: str | None = Field(None, description="Name of the run.")
    experiment_key: str | None = Field(None, description="Key of the run, 32 to 50 letters and digits.")
    online: bool | None = Field(None, description="Send records at once; null for true.")
    mode: str | None = Field(None, description="get, create, or get_or_create a run.")


class FlopsProfilerConfig(Loose):
    """Operations and time of each module, counted in one step."""

    enabled: bool = Field(False, description="Profile one step.")
    recompute_fwd_factor: NonNegative = Field(0.0, description="Share of the forward pass that backward repeats.")
    profile_step: Integer = Field(1, description="The update that is profiled: so many are done before it.")
    module_depth: Index = Field(-1, description="Depth of modules that is printed; -1 for the innermost.")
    top_modules: Integer = Field(1, description="Modules that are named at each depth.")
    detailed: bool = Field(True, description="Print the model module by module.")
    output_file: str | None = Field(None, description="File of the report; null prints it.")


class CommsLoggerConfig(Rare):
    """Time and size of each collective."""

    enabled: bool = Field(False, description="Record collectives.")
    prof_all: bool = Field(True, description="Record all of them.")
    prof_ops: list[str] = Field([], description="Names of those to record.")
    verbose: bool = Field(False, description="Print each after its update, which waits for the device.")
    debug: bool = Field(False, description="Add the name of the caller.")


class ThroughputConfig(Rare):
    """The throughput timer."""

    enabled: bool = Field(True, description="Time steps.")
    synchronized: bool = Field(True, description="Wait for the device before the clock is read.")


class TimersConfig(Loose):
    """DeepSpeed's timers."""

    throughput: ThroughputConfig | None = Field(None, description="Samples per second.")
