// Draws a captured dashboard with Grafana's own components: window.captured, as capture.py wrote it.
import {
  FieldColorModeId,
  FieldType,
  ThemeContext,
  createTheme,
  dateTime,
  getDisplayProcessor,
  getMinMaxAndDelta,
  reduceField,
  toDataFrame,
} from '@grafana/data';
import { initPluginTranslations } from '@grafana/i18n';
import { AxisPlacement, GraphDrawStyle, LineInterpolation, StackingMode } from '@grafana/schema';
import { BigValue, BigValueColorMode, BigValueGraphMode, BigValueTextMode, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import '@fontsource/inter/400.css';
import '@fontsource/inter/500.css';
import 'uplot/dist/uPlot.min.css';

const theme = createTheme({ colors: { mode: 'dark' } });
const CELL = { width: 64, height: 38, gap: 8 }; // of Grafana's grid, on a screen of 1536 by 1080 or so
const { board, answers, start, end, step } = window.captured;
const timeRange = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: 'now', to: 'now' } };

function named(legend, labels) {
  return legend ? legend.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? '') : '';
}

// What Grafana's application does before a panel sees its data: names, units, colours and scales.
function framesOf(panel) {
  const { defaults } = panel.fieldConfig;
  const frames = panel.targets.flatMap((target, index) =>
    answers[panel.id][index].map(({ metric, values, value }) => {
      const points = new Map((values ?? [value]).map(([time, text]) => [Math.round(time * 1000), Number(text)]));
      const times = [];
      for (let time = Math.min(...points.keys()); time <= Math.max(...points.keys()); time += step * 1000) times.push(time);
      return toDataFrame({
        refId: target.refId,
        fields: [
          { name: 'Time', type: FieldType.time, values: times },
          {
            name: named(target.legendFormat, metric) || panel.title, // of which colours are a function
            type: FieldType.number,
            values: times.map((time) => (Number.isFinite(points.get(time)) ? points.get(time) : null)),
            config: structuredClone(defaults),
          },
        ],
      });
    })
  );
  frames.forEach((frame, index) =>
    frame.fields.forEach((field) => {
      field.state = { seriesIndex: index, displayName: field.name, range: getMinMaxAndDelta(field) };
      field.display = getDisplayProcessor({ field, theme });
    })
  );
  return frames;
}

function Curves({ panel, frames, width, height }) {
  return (
    <TimeSeries
      frames={frames}
      structureRev={1}
      timeRange={timeRange}
      timeZone="utc"
      width={width}
      height={height}
      legend={panel.options.legend}
      options={panel.options}
    />
  );
}

// The state timeline is not among the published components: each bar is drawn as a filled step, one on top of another.
function Bars({ panel, frames, width, height }) {
  const custom = {
    drawStyle: GraphDrawStyle.Line,
    lineInterpolation: LineInterpolation.StepAfter,
    fillOpacity: 60,
    lineWidth: 0,
    showPoints: 'never',
    axisPlacement: AxisPlacement.Hidden,
    stacking: { mode: StackingMode.Normal, group: 'A' },
  };
  frames.forEach((frame) => {
    const [, field] = frame.fields;
    field.config = { ...field.config, color: { mode: FieldColorModeId.PaletteClassicByName }, custom, max: 1 };
    field.display = getDisplayProcessor({ field, theme });
  });
  const options = { ...panel.options, legend: { ...panel.options.legend, showLegend: true } };
  return <Curves panel={{ ...panel, options }} frames={frames} width={width} height={height} />;
}

function Figure({ panel, frames, width, height }) {
  const { options, fieldConfig } = panel;
  const shown = frames.map((frame) => {
    const [, field] = frame.fields;
    const value = field.display(reduceField({ field, reducers: ['lastNotNull'] }).lastNotNull);
    const curve = options.graphMode === 'area' && frame.length > 1;
    const name = options.textMode === 'name';
    return {
      value: { ...value, title: name || frames.length > 1 ? field.state.displayName : undefined },
      sparkline: curve ? { x: frame.fields[0], y: field, timeRange } : undefined,
      textMode: name ? BigValueTextMode.Name : frames.length > 1 ? BigValueTextMode.ValueAndName : BigValueTextMode.Value,
    };
  });
  if (!shown.length) {
    const empty = { text: fieldConfig.defaults.noValue ?? 'none', numeric: NaN, color: theme.colors.text.secondary };
    shown.push({ value: empty, textMode: BigValueTextMode.Value });
  }
  const each = height / shown.length;
  return shown.map((figure, index) => (
    <BigValue
      key={index}
      theme={theme}
      width={width}
      height={each}
      colorMode={BigValueColorMode.Value}
      graphMode={BigValueGraphMode.Area}
      {...figure}
    />
  ));
}

const KINDS = { timeseries: Curves, stat: Figure, 'state-timeline': Bars };

function Panel({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const box = { position: 'absolute', left: x * CELL.width, top: y * CELL.height };
  const [width, height] = [w * CELL.width - CELL.gap, h * CELL.height - CELL.gap];
  if (panel.type === 'row') {
    return <h4 style={{ ...box, margin: 0, paddingTop: 4, color: theme.colors.text.primary }}>{panel.title}</h4>;
  }
  const Kind = KINDS[panel.type];
  const frames = framesOf(panel);
  return (
    <div style={box}>
      <PanelChrome title={panel.title} width={width} height={height} padding="sm">
        {(w, h) =>
          frames.length || panel.type === 'stat' ? (
            <Kind panel={panel} frames={frames} width={w} height={h} />
          ) : (
            <div style={{ color: theme.colors.text.secondary }}>No data</div>
          )
        }
      </PanelChrome>
    </div>
  );
}

function Dashboard() {
  const rows = Math.max(...board.panels.map(({ gridPos: { y, h } }) => y + h));
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ position: 'relative', width: 24 * CELL.width, height: rows * CELL.height, margin: 8 }}>
        {board.panels.map((panel) => (
          <Panel key={panel.id} panel={panel} />
        ))}
      </div>
    </ThemeContext.Provider>
  );
}

document.body.style.cssText = `margin: 0; color: ${theme.colors.text.primary}; background: ${theme.colors.background.canvas}; font: ${theme.typography.body.fontSize} ${theme.typography.fontFamily};`;
initPluginTranslations('grafana-ui')
  .catch(() => undefined)
  .then(() => createRoot(document.body.appendChild(document.createElement('div'))).render(<Dashboard />));
