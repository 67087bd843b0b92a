"""What the server keeps: contract in `interface`, implementation in `sql`."""
