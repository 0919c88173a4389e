"""The registry's shell: decide, commit, act, and what people see of it."""
