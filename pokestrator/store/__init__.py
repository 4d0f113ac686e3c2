"""PostgreSQL: psycopg and SQL live in this folder and nowhere else. Also the templates, which are files."""
