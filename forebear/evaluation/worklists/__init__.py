"""Work lists: training rows that somebody should decide on, as files that people edit, and what becomes of them."""
