"""The server as this agent sees it: the only place of the agent that knows its wire messages."""
