"""The schema, revision by revision, by Alembic."""
