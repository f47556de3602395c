"""Parts that evaluations share: samples of queries, statistics, passages of rows."""
