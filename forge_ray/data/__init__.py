"""From raw logs to a dataset artifact: import, synthesise, prepare, describe, validate, stream."""
