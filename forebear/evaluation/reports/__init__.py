"""Reports: tables, charts and pages."""
