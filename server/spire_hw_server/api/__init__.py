"""The APIs of the server: who may call, and what each service does."""
