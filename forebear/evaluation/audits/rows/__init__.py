"""Audits of training rows: wrong labels, duplicates, hubs, rows behind mistakes."""
