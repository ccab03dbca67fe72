"""The command: composes a run from `conf/`, trains it, and leaves its report."""
