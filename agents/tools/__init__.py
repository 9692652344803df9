"""Tools of roles: typed functions and MCP servers, and how a model's calls of them are written and read."""
