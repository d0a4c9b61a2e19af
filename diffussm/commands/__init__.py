"""One module per command line: arguments → package calls → table, JSON, picture. `tools/` holds the doors to them."""
