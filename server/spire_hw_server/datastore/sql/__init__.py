"""The Datastore over SQLite, PostgreSQL and MariaDB/MySQL; `store.open_datastore` is the door."""
