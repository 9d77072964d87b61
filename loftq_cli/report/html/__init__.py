"""A report as one page for a browser: text, pictures, tables and the documents themselves."""
