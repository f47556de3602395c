"""Audits of what a model learnt: lexical overlap on HANS, any feature of the rows."""
