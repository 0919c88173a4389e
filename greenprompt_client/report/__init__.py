"""The report of a measurement for people: on a terminal, as HTML, as files."""
