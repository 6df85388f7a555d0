"""What the documentation is made with: the picture of the first page, and hooks of mkdocs."""
