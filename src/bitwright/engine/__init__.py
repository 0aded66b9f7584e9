"""The engine: recipe, plan, calibration, driver, journal, verify."""
