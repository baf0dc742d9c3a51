"""The few causes a run can fail for; the command line turns each into exit code 2 and one line.

Every message follows one formula: `path/field must rule, got value. Do this.` Each class takes that
message alone, so an error raised in a Ray worker arrives unchanged in the driver.
"""

from __future__ import annotations


class ForgeError(Exception):
    """Base of every failure that the user can act on."""


class ConfigError(ForgeError, ValueError):
    """A configuration value breaks a rule; nothing has been computed yet."""


class DataError(ForgeError, ValueError):
    """An input file, row or column breaks the data contract."""


class ArtifactError(ForgeError):
    """A stored artifact is missing, truncated, mismatched or in use."""


class StorageError(ForgeError):
    """A disk or a database that holds a run's state cannot be used; the same command continues."""


class ClusterError(ForgeError):
    """A Ray cluster does not answer, does not let us in, or does not know what was asked for."""


class TrainingError(ForgeError):
    """A training run diverged or lost its workers for good."""


class StoppedError(ForgeError):
    """A run was asked to stop, saved its state and ended; the same command continues it."""


def worker_error(error: Exception, rule: str, advice: str) -> ForgeError:
    """Our own error when a worker of Ray Train raised one, else a summary of the first failure.

    Args:
        error: what the trainer raised; its `worker_failures`, if any, are by rank.
        rule: beginning of the summary, up to `must …`.
        advice: what to do.
    """
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        for candidate in (failure, failure.__cause__, getattr(failure, "_base_exc", None)):
            if isinstance(candidate, ForgeError):
                return candidate
    text = str(next(iter(failures.values()), error)).strip()
    line = text.splitlines()[-1] if text else type(error).__name__
    return TrainingError(f"{rule}, got: {line}. {advice}")
