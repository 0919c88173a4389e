"""For Prompting Services and people: an HTTP client, the command line, experiments, reports."""
