"""What a Prompting Service or a person uses: a client over HTTP, the command line, experiments, reports."""
