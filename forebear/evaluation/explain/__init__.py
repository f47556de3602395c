"""One prediction explained: influential rows side by side with the words behind them."""
