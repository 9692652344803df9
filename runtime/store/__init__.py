"""The run store: one SQLite file, its records, migrations, and claims on runs."""
