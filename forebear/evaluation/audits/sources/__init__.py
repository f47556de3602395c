"""``audit sources``: which annotator, crawl, year or template helps, and which drives the errors."""
