"""The paper's tables (GrAInS, arXiv 2507.18043), each a command: `python -m recipes --help`."""
