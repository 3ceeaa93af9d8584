{{/* What all pods have in common. Only a control plane that makes Jobs calls the Kubernetes API: no other has a service account's token. */}}

{{- define "offbeat.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "offbeat.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* (root, component, values): where pods of a component run, and how they are spread */}}
{{- define "offbeat.placement" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
automountServiceAccountToken: {{ and (eq .component "control-plane") (eq .root.Values.trainer.kind "jobs") }}
enableServiceLinks: false
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "offbeat.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{/* root: environment of every service */}}
{{- define "offbeat.environment" -}}
{{- include "offbeat.unnamedEnvironment" . }}
- name: OFFBEAT_MEMBER
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end }}

{{/* root: without its name in the fleet */}}
{{- define "offbeat.unnamedEnvironment" -}}
- {name: OFFBEAT_REDIS_URL, value: {{ include "offbeat.redisUrl" . | quote }}}
- {name: OFFBEAT_REDIS_PASSWORD_FILE, value: /run/secrets/offbeat/redis-password}
- {name: OFFBEAT_CLUSTER_TOKEN_FILE, value: /run/secrets/offbeat/cluster-token}
- {name: OFFBEAT_LOG_LEVEL, value: {{ .Values.logLevel | quote }}}
- name: OFFBEAT_ADVERTISE
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{- define "offbeat.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 5
  failureThreshold: {{ div (add . 4) 5 }}
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}

{{/* (root, gpus, values): resources with so many GPUs */}}
{{- define "offbeat.modelResources" -}}
{{- $resources := deepCopy .values.resources -}}
{{- if .values.gpus }}
{{- $gpu := dict .root.Values.gpu.resource (int .values.gpus) -}}
{{- $resources = mergeOverwrite $resources (dict "limits" (mergeOverwrite (deepCopy (get $resources "limits" | default dict)) $gpu)) -}}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "offbeat.secretVolume" -}}
- name: secrets
  secret:
    secretName: {{ include "offbeat.secret" .root }}
    defaultMode: 0440
    items:
      {{- range .keys }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- end }}
